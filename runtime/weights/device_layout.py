"""Where a file's weights come to lie on a device, and the pieces they travel in: arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from twotower.weights.refs import PAGE, WeightRef

ALIGNMENT = 256
"""Bytes; TensorRT asks it of a tensor's address (`setTensorAddress`), and cudaMalloc keeps it."""

_NEAR = 16 * PAGE  # bytes nobody asked for that are cheaper read along than skipped


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a file that lie in one piece on a device, padding between weights included.

    Attributes:
        target: Where the first lies, from the beginning of the device's allocation.
    """

    start: int
    stop: int
    target: int


@dataclass(frozen=True, slots=True)
class Layout:
    """One file's weights in one allocation of a device.

    Attributes:
        offsets: Where each weight begins in it, by name; multiples of `ALIGNMENT`.
        runs: What is copied there, in the order of the file.
    """

    size: int
    offsets: Mapping[str, int]
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [start, stop) of a file that are read at once; `start` is a multiple of `PAGE`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of a chunk on its way to a device; offsets in bytes."""

    target: int
    source: int
    size: int


def lay_out(weights: Mapping[str, WeightRef]) -> Layout:
    """Places weights on a device in the order of their file.

    A weight that is aligned where its distance in the file puts it travels in one copy with the one
    before: large weights start on pages of the file and need one copy a chunk. Small ones start on
    cache lines and mostly get a run of their own. Two names of the same bytes share an address.
    """
    offsets: dict[str, int] = {}
    placed: dict[tuple[int, int], int] = {}
    runs: list[Run] = []
    end = 0
    for name, weight in sorted(weights.items(), key=lambda item: (item[1].offset, item[1].end)):
        place = (weight.offset, weight.end)
        if place not in placed:
            placed[place] = _append(runs, weight, end)
            end = placed[place] + weight.nbytes
        offsets[name] = placed[place]
    return Layout(
        end,
        offsets,
        tuple(run for run in runs if run.stop > run.start),
    )


def _append(runs: list[Run], weight: WeightRef, end: int) -> int:
    """Adds a weight behind `end`, to the last run if it can go on; returns where it lies."""
    if runs and 0 <= weight.offset - runs[-1].stop <= PAGE:
        target = weight.offset - runs[-1].start + runs[-1].target
        if target % ALIGNMENT == 0:
            runs[-1] = replace(runs[-1], stop=weight.end)
            return target
    target = -(-end // ALIGNMENT) * ALIGNMENT
    runs.append(Run(weight.offset, weight.end, target))
    return target


def cut_chunks(
    layouts: Iterable[Layout],
    *,
    size: int,
    most: int,
    whole: bool,
) -> list[Chunk]:
    """What is read of a file for these devices, in order; no byte is in two chunks.

    `most` bounds the bytes of a chunk, a multiple of `PAGE`; `whole` reads bytes between weights
    too.
    """
    spans: list[tuple[int, int]] = [(0, size)] if whole and size else []
    if not whole:
        runs = [run for layout in layouts for run in layout.runs]
        for run in sorted(runs, key=lambda r: r.start):
            start, stop = run.start // PAGE * PAGE, min(-(-run.stop // PAGE) * PAGE, size)
            if spans and start - spans[-1][1] <= _NEAR:
                spans[-1] = (spans[-1][0], max(spans[-1][1], stop))
            else:
                spans.append((start, stop))
    starts = [(at, stop) for start, stop in spans for at in range(start, stop, most)]
    return [Chunk(at, min(at + most, stop)) for at, stop in starts]


def copies(chunks: Sequence[Chunk], layout: Layout) -> list[tuple[Copy, ...]]:
    """For every chunk, what of it goes to a device."""
    stops = [chunk.stop for chunk in chunks]
    out: list[list[Copy]] = [[] for _ in chunks]
    for run in layout.runs:
        number = bisect_right(stops, run.start)
        while number < len(chunks) and chunks[number].start < run.stop:
            chunk = chunks[number]
            start, stop = max(run.start, chunk.start), min(run.stop, chunk.stop)
            target = start - run.start + run.target
            out[number].append(
                Copy(
                    target,
                    start - chunk.start,
                    stop - start,
                )
            )
            number += 1
    return [tuple(some) for some in out]
