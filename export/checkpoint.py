"""A published checkpoint, opened by its headers: every tensor's place known and checked before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.bundle import hash_file, inside
from twotower.config import ModelConfig, read_model_config
from twotower.config.tensors import expected_tensors
from twotower.errors import CheckpointError
from twotower.export.safetensors_header import HeaderError, StoredTensor, read_header

__all__ = ["Checkpoint", "Tensor", "locate_checkpoint"]

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
FLOAT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.txt"]
_LISTED = 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, not yet read.

    Attributes:
        name: Its published name.
        dtype: `float32`, `float16` or `bfloat16`.
        shape: Its shape.
        file: The shard.
        offset: First byte in the shard.
        nbytes: Its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        """Its raw little-endian bytes in pieces of whole elements.

        Raises:
            CheckpointError: the shard became shorter since it was opened.
        """
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                piece = file.read(min(chunk_bytes, left))
                while len(piece) % 4 and len(piece) < left:  # a short read must not cut an element
                    more = file.read(min(4 - len(piece) % 4, left - len(piece)))
                    if not more:
                        break
                    piece += more
                if not piece:
                    raise CheckpointError(
                        f"tensor {self.name} could not be read", found=f"{self.file} ends too early", do="download the shard again"
                    )
                left -= len(piece)
                yield piece

    def numpy(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The whole tensor: float16 and float32 as they are, bfloat16 widened to float32."""
        raw = b"".join(self.chunks(1 << 24))
        if self.dtype == "bfloat16":
            return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return np.frombuffer(raw, np.dtype(self.dtype)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its config and all its tensors, names, shapes and dtypes checked."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Opens a folder in the published layout, reading headers only.

        Raises:
            ConfigError: config.json is missing or unusable.
            CheckpointError: shards are missing, damaged or disagree with their index, or tensors are missing, extra,
                mis-shaped or of a dtype other than BF16, F16 and F32; all problems are listed at once.
        """
        root = Path(folder)
        if not root.is_dir():
            raise CheckpointError(f"there is no checkpoint folder '{folder}'", found="no such folder", do="name the folder that holds config.json")
        config = read_model_config(root / "config.json")
        problems: list[str] = []
        stored = _stored_tensors(root, problems)
        problems += _against_layout(config, stored) if not problems else []
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise CheckpointError(
                f"checkpoint '{folder}' has {len(problems)} problem(s)",
                found="; ".join(problems[:_LISTED]) + more,
                do="download the files named above again, or use the config.json that belongs to them",
            )
        tensors = {
            name: Tensor(name, FLOAT_DTYPES[s.dtype], s.shape, file, s.offset, s.nbytes) for name, (file, s) in stored.items()
        }
        return cls(root, config, tensors)

    def identity(self, tick: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every shard by file name; reads every byte."""
        files = sorted({t.file for t in self.tensors.values()})
        return {f.name: {"size": f.stat().st_size, "sha256": hash_file(f, tick)} for f in files}


def locate_checkpoint(name: str) -> Path:
    """The folder of a checkpoint given as a local folder or as a hub id (`owner/model`), which is downloaded or found in the cache.

    Raises:
        CheckpointError: neither; says which was tried.
    """
    path = Path(name)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path.expanduser()
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a hub id needs it

        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except ImportError as e:
        found = f"no such folder, and huggingface_hub is not installed to look for the hub id ({e})"
        raise CheckpointError(f"cannot find checkpoint '{name}'", found=found, do="name a local folder, or `pip install huggingface_hub`") from e
    except Exception as e:  # noqa: BLE001 - the hub client's errors come from several libraries
        found = f"no such folder, and the hub answered: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        raise CheckpointError(f"cannot find checkpoint '{name}'", found=found, do="download it yourself and name the folder") from e


_Stored = dict[str, tuple[Path, StoredTensor]]


def _stored_tensors(root: Path, problems: list[str]) -> _Stored:
    """Every tensor of every shard; what is wrong with the shards goes to `problems`."""
    index = _index(root, problems)
    names = sorted(set(index.values())) if index is not None else [SINGLE_FILE]
    out: _Stored = {}
    for name in names:
        path = inside(root, name) if isinstance(name, str) else None
        # A hub cache keeps its files as links to a store beside the snapshot: a plain name may be such a link.
        if path is None and isinstance(name, str) and os.path.basename(name) == name and (root / name).is_symlink():
            path = root / name
        if path is None:
            problems.append(f"the index names a path outside the folder: {name!r}")
            continue
        try:
            header = read_header(path)
        except FileNotFoundError:
            problems.append(f"{name}: missing" if index is not None else f"neither {INDEX_FILE} nor {SINGLE_FILE} is there")
            continue
        except (HeaderError, OSError) as e:
            problems.append(f"{name}: {e}")
            continue
        for tensor, entry in header.items():
            if tensor in out:
                problems.append(f"{tensor}: stored twice, in {out[tensor][0].name} and {name}")
            elif index is not None and index.get(tensor) != name:
                problems.append(f"{tensor}: stored in {name}, but the index says {index.get(tensor)}")
            out[tensor] = (path, entry)
    if index is not None and not problems:
        problems += [f"{tensor}: the index says {file}, which does not hold it" for tensor, file in index.items() if tensor not in out]
    return out


def _index(root: Path, problems: list[str]) -> dict[str, str] | None:
    path = root / INDEX_FILE
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(k): v for k, v in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        problems.append(f"{INDEX_FILE}: not a readable index ({type(e).__name__}: {e})")
        return {}


def _against_layout(config: ModelConfig, stored: _Stored) -> Iterator[str]:
    expected = expected_tensors(config)
    for name, want in expected.items():
        if name not in stored:
            yield f"{name}: missing"
        elif (got := stored[name][1]).shape != want.shape:
            yield f"{name}: shape {list(got.shape)} instead of {list(want.shape)}"
        elif got.dtype not in FLOAT_DTYPES:
            yield f"{name}: dtype {got.dtype} instead of one of {', '.join(FLOAT_DTYPES)}"
    yield from (f"{name}: not part of this model" for name in stored if name not in expected)
