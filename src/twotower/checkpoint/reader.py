"""A published checkpoint, opened by its headers: every tensor is checked before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from twotower.checkpoint.generation_defaults import read_eos_token_ids
from twotower.checkpoint.layout import expected_tensors
from twotower.checkpoint.shard import (
    FLOAT_DTYPES,
    HeaderError,
    Tensor,
    read_header,
    refuse_repeats,
)
from twotower.config import ModelConfig, read_model_config
from twotower.errors import CheckpointError
from twotower.files import FileRecord, inside

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.txt"]
_LISTED = 20
_NAME = 80


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its config and all its tensors, names, shapes and dtypes checked.

    `config` has the end-of-sequence tokens of generation_config.json if that names any.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Opens a folder in the published layout, reading headers only.

        Raises:
            ConfigError: config.json is missing or unusable, or generation_config.json names
                unusable end-of-sequence tokens.
            CheckpointError: shards are missing, damaged or disagree with their index, or tensors
                are missing, extra, mis-shaped or not BF16, F16 or F32; all problems are listed at
                once.
        """
        root = Path(folder)
        # os.path says no where pathlib raises: a name too long, a parent closed to this user
        if not os.path.isdir(root):
            found = "a file" if os.path.exists(root) else "no such folder"
            raise CheckpointError(
                f"there is no checkpoint folder '{folder}'",
                found=found,
                do="name the folder that holds config.json",
            )
        config = read_model_config(root / "config.json")
        config = replace(config, eos_token_ids=read_eos_token_ids(root, config))
        shards = _Shards(root)
        shards.read()
        problems = shards.problems or list(shards.against_layout(config))
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise CheckpointError(
                f"checkpoint '{folder}' has {len(problems)} problem(s)",
                found="; ".join(problems[:_LISTED]) + more,
                do="download the files named above again, or use their own config.json",
            )
        return cls(root, config, shards.stored)

    def identity(self, tick: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of every shard by its path in the folder; reads every byte."""
        files = sorted({t.file for t in self.tensors.values()})
        return {f.relative_to(self.path).as_posix(): asdict(FileRecord.of(f, tick)) for f in files}


def locate_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: a local one, or of a hub id (`owner/model`) in the hub's cache.

    What the cache does not hold is downloaded. CheckpointError if neither is found.
    """
    # os.path lets stand what pathlib raises for: no such user, a name too long
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    what = f"cannot find checkpoint '{name}'"
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise CheckpointError(
            what,
            found="no such folder, and not a hub id either (`owner/model`)",
            do="name the folder that holds config.json, or a hub id",
        )
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a hub id needs it

        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except ImportError as e:
        raise CheckpointError(
            what,
            found=f"no such folder, and huggingface_hub for hub ids is not installed ({e})",
            do="name a local folder, or `pip install huggingface_hub`",
        ) from e
    except Exception as e:
        first_line = str(e).partition("\n")[0]
        raise CheckpointError(
            what,
            found=f"no such folder, and the hub answered: {type(e).__name__}: {first_line}",
            do="download it yourself and name the folder",
        ) from e


class _Shards:
    """A folder's shard headers held against their index: all tensors, and what is wrong."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.stored: dict[str, Tensor] = {}
        self.problems: list[str] = []

    def read(self) -> None:
        index = self._index()
        if index is None:
            if (self._root / SINGLE_FILE).exists():
                self._read_shard(SINGLE_FILE, None)
            else:
                self.problems.append(f"neither {INDEX_FILE} nor {SINGLE_FILE} is there")
            return
        read = set()
        for name in sorted(set(index.values())):
            if self._read_shard(name, index):
                read.add(name)
        # A shard that could not be read is one problem, not one a tensor.
        for tensor, name in index.items():
            if tensor not in self.stored and name in read:
                self.problems.append(f"{tensor}: the index says {name}, which does not hold it")

    def _index(self) -> dict[str, str] | None:
        """The shard of each tensor; None where there is no index."""
        path = self._root / INDEX_FILE
        if not path.is_file():
            return None
        try:
            text = path.read_text(encoding="utf-8")
            table = dict(json.loads(text, object_pairs_hook=refuse_repeats)["weight_map"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            self.problems.append(f"{INDEX_FILE}: not a readable index ({type(e).__name__}: {e})")
            return {}
        for tensor, name in list(table.items()):
            if not isinstance(name, str):
                shown = _short(repr(table.pop(tensor)))
                self.problems.append(
                    f"{INDEX_FILE}: the file of {tensor} is not a name but {shown}"
                )
        return table

    def _read_shard(self, name: str, index: Mapping[str, str] | None) -> bool:
        """Takes in a shard's tensors, or what is wrong with it; whether it could be read."""
        path = self._path_of(name)
        if path is None:
            outside = "the index names a path outside the folder, or none at all"
            self.problems.append(f"{outside}: {_short(name)}")
            return False
        try:
            header = read_header(path)
        except FileNotFoundError:
            self.problems.append(f"{name}: missing")
            return False
        except (HeaderError, OSError) as e:
            self.problems.append(f"{_short(name)}: {e.strerror if isinstance(e, OSError) else e}")
            return False
        for tensor, entry in header.items():
            if tensor in self.stored:
                first = self.stored[tensor].file.name
                self.problems.append(f"{tensor}: stored twice, in {first} and {name}")
            elif index is not None and index.get(tensor) != name:
                listed = index.get(tensor)
                says = "does not list it" if listed is None else f"says {_short(listed)}"
                self.problems.append(f"{tensor}: stored in {name}, but the index {says}")
            self.stored[tensor] = entry
        return True

    def _path_of(self, name: str) -> Path | None:
        """The file of a shard; None for a name outside the folder, or an impossible one."""
        try:
            path = inside(self._root, name)
            # A hub cache keeps its files as links to a store beside the snapshot: a plain name may
            # be such a link.
            linked = self._root / name
            if path is None and os.path.basename(name) == name and linked.is_symlink():
                return linked
        except (
            ValueError,
            OSError,
            RuntimeError,
        ):  # a zero byte, a lone surrogate; a link to itself
            return None
        return path

    def against_layout(self, config: ModelConfig) -> Iterator[str]:
        """What does not fit the model."""
        expected = expected_tensors(config)
        for name, want in expected.items():
            if name not in self.stored:
                yield f"{name}: missing"
                continue
            got = self.stored[name]
            if got.shape != want.shape:
                yield f"{name}: shape {list(got.shape)} instead of {list(want.shape)}"
            if got.dtype not in FLOAT_DTYPES.values():
                yield f"{name}: dtype {got.dtype} instead of one of {', '.join(FLOAT_DTYPES)}"
        yield from (
            f"{name}: not part of this model" for name in self.stored if name not in expected
        )


def _short(name: str) -> str:
    return repr(name if len(name) <= _NAME else f"{name[:_NAME]}...")
