"""What was measured of a quantized bundle, noted in its `bundle.json`: whoever opens it learns of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from twotower.bundle.manifest import MANIFEST_FILE, Bundle, write_json
from twotower.errors import BundleError

__all__ = ["flags_of_bundle", "note_measurement"]


def note_measurement(bundle: Bundle, measured: Mapping[str, Any]) -> None:
    """Replaces the note of an earlier measurement. The manifest is written whole or not at all; no other file changes.

    Raises:
        BundleError: the bundle is not quantized, or cannot be written.
    """
    if bundle.quantization is None:
        raise BundleError(f"bundle '{bundle.path}' is not quantized", found="no recipe in its manifest", do="measure a quantized bundle")
    file = bundle.path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        manifest["quantization"]["measured"] = dict(measured)
        write_json(file, manifest)
    except OSError as e:
        raise BundleError(
            f"cannot note the measurement in {file}", found=str(e), do="make the folder writable, or pass --no-note to measure only"
        ) from e


def flags_of_bundle(bundle: Bundle) -> list[str]:
    """Sentences a user must read before trusting the bundle; empty for a float one, and for one that is inside its budget."""
    if bundle.quantization is None:
        return []
    measured = bundle.quantization.get("measured")
    if measured is None:
        return []
    return [str(flag) for flag in measured["flags"]]
