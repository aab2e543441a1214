"""The manifest of a new bundle: what is known before its files are, and the list of them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from twotower import __version__
from twotower.bundle import MANIFEST_FILE, SCHEMA, FileRecord, hash_file, write_json
from twotower.config import GenerationConfig, ModelConfig
from twotower.export.graphs.recorder import OPSET
from twotower.records import encode
from twotower.spec import signatures

__all__ = ["base_manifest", "write_manifest"]

_KINDS = (
    *("embedding", "mamba", "attention", "routed_expert", "shared_expert", "mlp"),
    *("conditioning", "head"),
)
_ALWAYS_FLOAT32 = ("norm", "router", "ssm_state", "ssm_scan", "softmax", "logits")


def base_manifest(
    config: ModelConfig, dtype: str, *, defaults: GenerationConfig, trained_block_size: int
) -> dict[str, Any]:
    """All of a manifest but its source and its files.

    Args:
        config: The model.
        dtype: Element type of the graphs.
        defaults: Generation defaults.
        trained_block_size: S the denoiser was trained with.
    """
    return {
        "schema": SCHEMA,
        "requires": [],
        "twotower": __version__,
        "model": config.to_json(),
        "dtype": dtype,
        "precision": {
            **dict.fromkeys(_KINDS, dtype),
            **dict.fromkeys(_ALWAYS_FLOAT32, "float32"),
        },
        "generation": {
            "trained_block_size": trained_block_size,
            "defaults": defaults.to_json(),
        },
        "signatures": encode(signatures(config, dtype)),
        "tools": {
            "opset": str(OPSET),
            "python": platform.python_version(),
            **_versions("onnx-ir", "onnx", "onnxruntime", "torch", "numpy"),
        },
    }


def write_manifest(
    folder: Path, manifest: Mapping[str, Any], known: Mapping[str, FileRecord]
) -> None:
    """Lists every file of an unpublished bundle and writes its `bundle.json`, the last file.

    Args:
        folder: The bundle's folder.
        manifest: The rest of the manifest.
        known: Files that were hashed while they were written; the others are hashed now.
    """
    files = dict(known)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative not in files:
            files[relative] = FileRecord(path.stat().st_size, hash_file(path))
    listed = encode(dict(sorted(files.items())))
    write_json(folder / MANIFEST_FILE, {**manifest, "files": listed})


def _versions(*distributions: str) -> dict[str, str]:
    out = {}
    for name in distributions:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
