"""Checkpoints for benches: the published layout at any size, with random weights or with headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twotower.errors import ConfigError
from twotower.export.checkpoint import INDEX_FILE, SINGLE_FILE
from twotower.export.synthetic import PUBLISHED_CONFIG, SyntheticOptions, published_slice
from twotower.export.synthetic import write_checkpoint as _write

__all__ = ["PUBLISHED_CONFIG", "real_width_slice", "write_checkpoint", "write_headers_only"]

_DTYPES = {"BF16": "bfloat16", "F32": "float32"}


def real_width_slice(pattern: str = "ME*") -> dict[str, Any]:
    """The published config with other layers: 8.3 GB in BF16 for one of each kind."""
    return published_slice(pattern)


def write_checkpoint(
    folder: Path, config_json: dict[str, Any], *, dtype: str = "BF16", seed: int = 0, shards: int = 2, single_file: bool = False
) -> Path:
    """Writes random weights of sane magnitude in one stream (the writer is `twotower.export.synthetic`).

    Args:
        folder: A folder to make.
        config_json: A config.json; its dtype is replaced by `dtype`.
        dtype: `BF16` or `F32`, as safetensors spells it.
        seed: Names the weights.
        shards: Files to spread the tensors over.
        single_file: One `model.safetensors` without an index instead.

    Raises:
        CheckpointError: the folder exists.
        ConfigError: the dtype is another one, or the config is unusable.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"cannot write a checkpoint in {dtype!r}", found=f"allowed: {', '.join(_DTYPES)}", do="choose one of them")
    options = SyntheticOptions(seed=seed, shards=1 if single_file else shards)
    _write(folder, {**config_json, "torch_dtype": _DTYPES[dtype]}, options)
    if single_file:
        (shard,) = folder.glob("*.safetensors")
        shard.rename(folder / SINGLE_FILE)
        (folder / INDEX_FILE).unlink()
    return folder


def write_headers_only(folder: Path, config_json: dict[str, Any], *, shards: int = 13) -> Path:
    """Writes right headers over sparse files: the published 118 GB can be opened and inspected without the disk for them.

    Raises:
        CheckpointError: the folder exists.
        ConfigError: the config is unusable.
    """
    return _write(folder, config_json, SyntheticOptions(shards=shards, headers_only=True))
