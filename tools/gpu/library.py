"""A library that is too large for one transfer, in parts that are joined on the other side.

Each part is compressed on its own, so that parts are made and unpacked side by side.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

from twotower.errors import ConfigError

__all__ = ["join_file", "split_file"]

_DICTIONARY = 128 << 20
_PRESET = 6  # 9 takes longer and saves one part in a hundred of such a library
_DO = "bring every part that `make gpu-pack` made, each whole, and name their folders with --pack"


def split_file(
    file: Path,
    folders: Sequence[Path],
    *,
    shares: Sequence[int] | None = None,
    preset: int = _PRESET,
) -> list[Path]:
    """Writes a file as one compressed part a folder: `<name>.0.xz`, `<name>.1.xz` and so on.

    Args:
        file: A program or library for x86: its jumps are encoded so that they compress.
        folders: Where each part goes.
        shares: How the file is divided among the folders; None for equal parts.
        preset: Effort of the compression, 0 to 9.

    Returns:
        The parts.
    """
    data = file.read_bytes()
    parted = [0, *accumulate(shares or [1] * len(folders))]
    ends = [len(data) * end // parted[-1] for end in parted]
    pieces = [data[start:end] for start, end in pairwise(ends)]
    about = {"parts": len(folders), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with ProcessPoolExecutor(max_workers=2) as pool:
        packed = list(pool.map(_compressed, pieces, [preset] * len(pieces)))
    parts = []
    for i, (folder, part) in enumerate(zip(folders, packed, strict=True)):
        folder.mkdir(parents=True, exist_ok=True)
        parts.append(folder / f"{file.name}.{i}.xz")
        parts[-1].write_bytes(part)
        (folder / f"{file.name}.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    return parts


def join_file(name: str, folders: Sequence[Path], output: Path) -> Path:
    """Joins the parts of a file found in folders; a file that is there already is taken as it is.

    Raises:
        ConfigError: a part is missing or damaged.
    """
    if output.is_file():
        return output
    beside = next((f for folder in folders if (f := folder / f"{name}.json").is_file()), None)
    if beside is None:
        raise ConfigError(f"no part of {name} is here", found=_listed(folders), do=_DO)
    about = json.loads(beside.read_text(encoding="utf-8"))
    found = {i: _part(name, i, folders) for i in range(about["parts"])}
    missing = [f"{name}.{i}.xz" for i, part in found.items() if part is None]
    if missing:
        raise ConfigError(f"parts of {name} are missing", found=", ".join(missing), do=_DO)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial, seen = output.with_name(f".{output.name}.partial"), hashlib.sha256()
    with partial.open("wb") as out:
        for part in found.values():
            assert part is not None
            try:
                data = lzma.decompress(part.read_bytes())
            except lzma.LZMAError as e:
                raise ConfigError(f"{part.name} is damaged", found=str(e), do=_DO) from e
            seen.update(data)
            out.write(data)
    if seen.hexdigest() != about["sha256"]:
        partial.unlink()
        raise ConfigError(
            f"the parts of {name} do not belong together",
            found=f"SHA-256 {seen.hexdigest()}, expected {about['sha256']}",
            do=_DO,
        )
    partial.replace(output)
    return output


def _compressed(data: bytes, preset: int) -> bytes:
    filters = [
        {"id": lzma.FILTER_X86},
        {"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": _DICTIONARY},
    ]
    return lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters)


def _part(name: str, index: int, folders: Sequence[Path]) -> Path | None:
    places = (folder / f"{name}.{index}.xz" for folder in folders)
    return next((part for part in places if part.is_file()), None)


def _listed(folders: Sequence[Path]) -> str:
    return f"looked in {', '.join(map(str, folders)) or 'no folder'}"
