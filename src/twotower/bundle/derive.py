"""Bundles changed without touching what they hold: a new one with other settings, and a note of what was measured of one.

The new one has the same files under a new name, without copying 118 GB. Whoever opens a bundle
learns what is noted in its `bundle.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.bundle.manifest import MANIFEST_FILE, Bundle, write_json
from twotower.config import GenerationConfig
from twotower.errors import BundleError
from twotower.files import link_file, unpublished

__all__ = ["derive_bundle", "flags_of_bundle", "note_measurement"]


def derive_bundle(
    bundle: Bundle,
    output: Path,
    *,
    presets: Mapping[str, GenerationConfig],
    default: str,
    reports: Mapping[str, Any] | None = None,
) -> Bundle:
    """A bundle that differs in its presets and defaults only; its engines come along.

    Files are hard links where the file system allows it (a bundle's files are never changed in
    place), copies elsewhere.

    Args:
        bundle: The original; not changed.
        output: The folder to make.
        presets: Named settings to store.
        default: The one that becomes the bundle's default.
        reports: JSON reports to store, by name; how the presets were found, for instance.

    Raises:
        BundleError: the folder exists, or cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise BundleError(
            f"the output folder '{output}' exists already",
            found="a bundle is never overwritten",
            do="name a new folder with -o",
        )
    manifest = json.loads((bundle.path / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest["generation"]["presets"] = {name: config.to_json() for name, config in presets.items()}
    manifest["generation"]["defaults"] = presets[default].to_json()
    try:
        with unpublished(output) as folder:
            for source in sorted(p for p in bundle.path.rglob("*") if p.is_file()):
                relative = source.relative_to(bundle.path)
                if relative.as_posix() != MANIFEST_FILE and not _hidden_engine(relative):
                    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                    link_file(source, folder / relative)
            for name, report in (reports or {}).items():
                file = folder / "reports" / f"{name}.json"
                file.unlink(missing_ok=True)  # a link to the original's must not be written through
                write_json(file, report)
            write_json(folder / MANIFEST_FILE, manifest)
    except OSError as e:
        raise BundleError(
            f"the bundle '{output}' could not be written",
            found=str(e),
            do="free disk space or check permissions; nothing was left behind",
        ) from e
    return Bundle.open(output, contents=False)


def _hidden_engine(relative: Path) -> bool:
    """Locks, the cache, half-built engines and graphs that failed belong to the bundle they came about in."""
    return relative.parts[0] == "engines" and any(part.startswith(".") for part in relative.parts)


def note_measurement(bundle: Bundle, measured: Mapping[str, Any]) -> None:
    """Replaces the note of an earlier measurement. The manifest is written whole or not at all; no other file changes.

    Raises:
        BundleError: the bundle is not quantized, or cannot be written.
    """
    if bundle.quantization is None:
        raise BundleError(
            f"bundle '{bundle.path}' is not quantized",
            found="no recipe in its manifest",
            do="measure a quantized bundle",
        )
    file = bundle.path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        manifest["quantization"]["measured"] = dict(measured)
        write_json(file, manifest)
    except OSError as e:
        raise BundleError(
            f"cannot note the measurement in {file}",
            found=str(e),
            do="make the folder writable, or pass --no-note to measure only",
        ) from e


def flags_of_bundle(bundle: Bundle) -> list[str]:
    """Sentences a user must read before trusting the bundle; empty for a float one, and for one that is inside its budget."""
    if bundle.quantization is None:
        return []
    measured = bundle.quantization.get("measured")
    if measured is None:
        return []
    return [str(flag) for flag in measured["flags"]]
