"""Bundles of the fixtures, made in this process."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers.graphs import FIXTURES
from twotower.builders import build_engines, builder_for
from twotower.bundle import Bundle
from twotower.export import Checkpoint, ExportConfig, export_bundle


def export_fixture(folder: str, output: Path, dtype: str | None = None) -> Bundle:
    """An unverified bundle of a fixture."""
    return export_bundle(Checkpoint.open(FIXTURES / folder), output, ExportConfig(dtype=dtype))


def built_fixture(folder: str, output: Path, dtype: str | None = None) -> Bundle:
    """An unverified bundle of a fixture with an ort-cpu engine."""
    bundle = export_fixture(folder, output, dtype)
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"))
    return bundle


def copy_of(bundle: Bundle, target: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(bundle.path, target)
    return target


def flip_byte(path: Path, offset: int = -1) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(bytes(data))
