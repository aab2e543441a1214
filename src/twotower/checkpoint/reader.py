"""A published checkpoint, opened by its headers: every tensor's place known and checked before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twotower.checkpoint.generation_defaults import read_eos_token_ids
from twotower.checkpoint.layout import expected_tensors
from twotower.checkpoint.shard import HeaderError, StoredTensor, Tensor, read_header, refuse_repeats
from twotower.config import ModelConfig, read_model_config
from twotower.dtypes import DTYPES, FLOATS
from twotower.errors import CheckpointError
from twotower.files import hash_file, inside

__all__ = ["Checkpoint", "locate_checkpoint"]

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
FLOAT_DTYPES = {DTYPES[name].safetensors: name for name in FLOATS}
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.txt"]
_LISTED = 20
_NAME = 80


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its config and all its tensors, names, shapes and dtypes checked.

    Attributes:
        path: The folder.
        config: Its config.json, with the end-of-sequence tokens of generation_config.json if that
            names any.
        tensors: Every tensor by its name.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Opens a folder in the published layout, reading headers only.

        Raises:
            ConfigError: config.json is missing or unusable, or generation_config.json names
                end-of-sequence tokens that are.
            CheckpointError: shards are missing, damaged or disagree with their index, or tensors
                are missing, extra, mis-shaped or of a dtype other than BF16, F16 and F32; all
                problems are listed at once.
        """
        root = Path(folder)
        if not os.path.isdir(
            root
        ):  # os.path says no where pathlib raises: a name too long, a parent closed to this user
            found = "a file" if os.path.exists(root) else "no such folder"
            raise CheckpointError(
                f"there is no checkpoint folder '{folder}'",
                found=found,
                do="name the folder that holds config.json",
            )
        config = read_model_config(root / "config.json")
        config = replace(config, eos_token_ids=read_eos_token_ids(root, config))
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
            name: Tensor(name, FLOAT_DTYPES[s.dtype], s.shape, file, s.offset, s.nbytes)
            for name, (file, s) in stored.items()
        }
        return cls(root, config, tensors)

    def identity(self, tick: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every shard by its path in the folder; reads every byte."""
        files = sorted({t.file for t in self.tensors.values()})
        return {
            f.relative_to(self.path).as_posix(): {
                "size": f.stat().st_size,
                "sha256": hash_file(f, tick),
            }
            for f in files
        }


def locate_checkpoint(name: str) -> Path:
    """The folder of a checkpoint given as a local folder or as a hub id (`owner/model`), which is downloaded or found in the cache.

    Raises:
        CheckpointError: neither; says which was tried.
    """
    path = Path(
        os.path.expanduser(name)
    )  # os.path lets stand what pathlib raises for: no such user, a name too long
    if os.path.exists(path):
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        found = "no such folder, and not a hub id either (`owner/model`)"
        raise CheckpointError(
            f"cannot find checkpoint '{name}'",
            found=found,
            do="name the folder that holds config.json, or a hub id",
        )
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a hub id needs it

        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except ImportError as e:
        found = f"no such folder, and huggingface_hub is not installed to look for the hub id ({e})"
        raise CheckpointError(
            f"cannot find checkpoint '{name}'",
            found=found,
            do="name a local folder, or `pip install huggingface_hub`",
        ) from e
    except Exception as e:
        found = f"no such folder, and the hub answered: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        raise CheckpointError(
            f"cannot find checkpoint '{name}'",
            found=found,
            do="download it yourself and name the folder",
        ) from e


_Stored = dict[str, tuple[Path, StoredTensor]]


def _stored_tensors(root: Path, problems: list[str]) -> _Stored:
    """Every tensor of every shard; what is wrong with the shards goes to `problems`."""
    index = _index(root, problems)
    names = sorted(set(index.values())) if index is not None else [SINGLE_FILE]
    out: _Stored = {}
    read: set[str] = set()
    for name in names:
        path = _shard(root, name)
        if path is None:
            problems.append(
                f"the index names a path outside the folder, or none at all: {_short(name)}"
            )
            continue
        try:
            header = read_header(path)
        except FileNotFoundError:
            problems.append(
                f"{name}: missing"
                if index is not None
                else f"neither {INDEX_FILE} nor {SINGLE_FILE} is there"
            )
            continue
        except (HeaderError, OSError) as e:
            problems.append(f"{_short(name)}: {e.strerror if isinstance(e, OSError) else e}")
            continue
        read.add(name)
        for tensor, entry in header.items():
            if tensor in out:
                problems.append(f"{tensor}: stored twice, in {out[tensor][0].name} and {name}")
            elif index is not None and index.get(tensor) != name:
                problems.append(
                    f"{tensor}: stored in {name}, but the index {_says(index.get(tensor))}"
                )
            out[tensor] = (path, entry)
    problems += _not_held(index or {}, out, read)
    return out


def _not_held(index: Mapping[str, str], stored: _Stored, read: Collection[str]) -> Iterator[str]:
    """What the index promises of the shards that could be read; a shard that could not is one problem, not one a tensor."""
    for tensor, name in index.items():
        if tensor not in stored and name in read:
            yield f"{tensor}: the index says {name}, which does not hold it"


def _shard(root: Path, name: str) -> Path | None:
    """The file of a shard, or None for a name that leads out of the folder or that no file system takes."""
    try:
        path = inside(root, name)
        # A hub cache keeps its files as links to a store beside the snapshot: a plain name may be
        # such a link.
        if path is None and os.path.basename(name) == name and (root / name).is_symlink():
            path = root / name
    except (ValueError, OSError, RuntimeError):  # a zero byte, a lone surrogate; a link to itself
        return None
    return path


def _short(name: str) -> str:
    return repr(name if len(name) <= _NAME else f"{name[:_NAME]}...")


def _says(name: str | None) -> str:
    return "does not list it" if name is None else f"says {_short(name)}"


def _index(root: Path, problems: list[str]) -> dict[str, str] | None:
    path = root / INDEX_FILE
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_repeats)[
            "weight_map"
        ]
        wrong = [tensor for tensor, name in table.items() if not isinstance(name, str)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        problems.append(f"{INDEX_FILE}: not a readable index ({type(e).__name__}: {e})")
        return {}
    problems += [
        f"{INDEX_FILE}: the file of {tensor} is not a name but {_short(repr(table[tensor]))}"
        for tensor in wrong
    ]
    return {tensor: name for tensor, name in table.items() if isinstance(name, str)}


def _against_layout(config: ModelConfig, stored: _Stored) -> Iterator[str]:
    expected = expected_tensors(config)
    for name, want in expected.items():
        if name not in stored:
            yield f"{name}: missing"
            continue
        got = stored[name][1]
        if got.shape != want.shape:
            yield f"{name}: shape {list(got.shape)} instead of {list(want.shape)}"
        if got.dtype not in FLOAT_DTYPES:
            yield f"{name}: dtype {got.dtype} instead of one of {', '.join(FLOAT_DTYPES)}"
    yield from (f"{name}: not part of this model" for name in stored if name not in expected)
