"""One flipped bit in a bundle: the check at opening finds it, and nothing else happens."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.faults.trials import Outcome, words_wrong
from tools.faults.worker import Worker

_WORDS = ("--tokens", "5 6 7", "--max-new-tokens", "2", "--threads", "1")


@dataclass(frozen=True)
class Flip:
    """A bit of a file: its path within the bundle, the byte, and the bit of it."""

    name: str
    byte: int
    bit: int


def flips(bundle: Path, count: int, chance: random.Random) -> Iterator[Flip]:
    """Random bits: half of them in files drawn alike, so that small ones have their share."""
    files = sorted(p for p in bundle.rglob("*") if p.is_file() and p.stat().st_size)
    sizes = [p.stat().st_size for p in files]
    for number in range(count):
        (file,) = chance.choices(files, None if number % 2 else sizes)
        byte = chance.randrange(file.stat().st_size)
        yield Flip(file.relative_to(bundle).as_posix(), byte, chance.randrange(8))


class Place:
    """A copy of a bundle to flip bits in; one for each worker."""

    def __init__(self, worker: Worker, bundle: Path, copy: Path) -> None:
        self._worker = worker
        self._copy = copy
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bundle, copy)

    def flip(self, flip: Flip) -> Outcome:
        """A text from the bundle with this bit flipped; it is flipped back afterwards."""
        self._turn(flip)
        ended = self._worker.run(("generate", str(self._copy), *_WORDS))
        self._turn(flip)
        wrong = words_wrong(ended)
        if ended.code == 0:
            wrong.append("not found by the full check")
        return Outcome(f"bit {flip.bit} of byte {flip.byte} of {flip.name}", ended, tuple(wrong))

    def _turn(self, flip: Flip) -> None:
        with (self._copy / flip.name).open("r+b") as file:
            file.seek(flip.byte)
            (value,) = file.read(1)
            file.seek(flip.byte)
            file.write(bytes([value ^ 1 << flip.bit]))
