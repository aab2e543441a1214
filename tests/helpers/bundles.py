"""Bundles of the fixtures, made in this process."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.helpers.graphs import FIXTURES
from tests.helpers.source import ROOT
from twotower.builders import build_engines, builder_for
from twotower.bundle import Bundle
from twotower.export import Checkpoint, ExportConfig, export_bundle

TRUNCATED_AND_PADDED = {
    "truncation": {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    },
}
"""Of a tokenizer.json, as after a training."""


_EXPORTED = TemporaryDirectory(prefix="twotower-exported-")


def fresh_export(folder: str | Path, output: Path, dtype: str | None = None) -> Bundle:
    """An unverified bundle of a fixture or a checkpoint, for tests of the export itself."""
    return export_bundle(Checkpoint.open(FIXTURES / folder), output, ExportConfig(dtype=dtype))


def export_fixture(folder: str | Path, output: Path, dtype: str | None = None) -> Bundle:
    """The same for all others: a process exports each once, and this is a copy."""
    shutil.copytree(_exported(folder, dtype), output, copy_function=shutil.copyfile)
    return Bundle.open(output, contents=False)


@cache
def _exported(folder: str | Path, dtype: str | None) -> Path:
    output = Path(_EXPORTED.name) / f"{Path(folder).name}-{dtype}"
    fresh_export(folder, output, dtype)
    return output


def built_fixture(folder: str, output: Path, dtype: str | None = None) -> Bundle:
    """An unverified bundle of a fixture with an ort-cpu engine."""
    bundle = export_fixture(folder, output, dtype)
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"))
    return bundle


def tiny_checkpoint(target: Path, **changed: dict[str, Any]) -> Path:
    """The trained model's checkpoint with changed fields in JSON files; weights are linked.

    Args:
        target: The folder to make.
        changed: File name without `.json` -> its changed top-level fields.
    """
    shutil.copytree(ROOT / "assets" / "twotower-tiny", target, copy_function=_link)
    for name, values in changed.items():
        file = target / f"{name}.json"
        data = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        file.write_text(json.dumps({**data, **values}), encoding="utf-8")
    return target


def built_tiny(target: Path, **changed: dict[str, Any]) -> Bundle:
    """An unverified bundle of such a checkpoint with an ort-cpu engine."""
    source = tiny_checkpoint(target.with_name(f"{target.name}.checkpoint"), **changed)
    bundle = export_bundle(Checkpoint.open(source), target)
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"))
    return bundle


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def copy_of(bundle: Bundle, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(bundle.path, target)
    return target


def flip_byte(path: Path, offset: int = -1) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(bytes(data))
