"""The files of a checkpoint's tokenizer: checked before an export begins, and copied into the bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

from twotower.bundle import TOKENIZER_FILE
from twotower.errors import CheckpointError

__all__ = ["check_tokenizer", "copy_tokenizer"]

_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def check_tokenizer(source: Path) -> None:
    """Refuses a `tokenizer.json` that the runtime could not open; a checkpoint may have none.

    Args:
        source: The checkpoint's folder.

    Raises:
        CheckpointError: it cannot be read, or is not a tokenizer.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 - only where there is a file

    path = source / _NAMES[0]
    if not path.is_file():
        return
    do = "download it again, or remove it to export a bundle that takes token ids only"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"cannot read {path}", found=str(e), do=do) from e
    try:
        Tokenizer.from_str(text)
    except Exception as e:  # the library raises plain Exception for every fault of a file
        raise CheckpointError(f"{path} is not a tokenizer", found=str(e), do=do) from e


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Takes what a tokenizer needs along; a checkpoint without one makes a bundle for token ids only.

    Args:
        source: The checkpoint's folder.
        folder: The bundle's.
    """
    target = (folder / TOKENIZER_FILE).parent
    for name in _NAMES:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
