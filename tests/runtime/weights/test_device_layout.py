"""Every weight lies aligned and apart, and chunks bring each of its bytes there exactly once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.runtime.weights.device_layout import (
    ALIGNMENT,
    Chunk,
    Run,
    copies,
    cut_chunks,
    lay_out,
)
from twotower.weights.refs import PAGE, WeightRef, aligned

MIB = 1 << 20


def in_a_file(sizes: list[int]) -> dict[str, WeightRef]:
    out: dict[str, WeightRef] = {}
    end = 0
    for number, size in enumerate(sizes):
        out[f"w{number}"] = ref(aligned(end, size), size)
        end = out[f"w{number}"].end
    return out


def ref(offset: int, size: int) -> WeightRef:
    return WeightRef("int8", (size,), offset)


def named(weights: dict[str, WeightRef], *numbers: int) -> dict[str, WeightRef]:
    return {name: weights[name] for name in (f"w{n}" for n in numbers)}


SIZE = st.one_of(st.integers(0, 9000), st.integers(MIB, MIB + 9000))
SIZES = st.lists(SIZE, min_size=1, max_size=20)


@given(SIZES, st.data())
def test_chunks_bring_every_byte_to_its_place_once(sizes: list[int], data: st.DataObject) -> None:
    weights = in_a_file(sizes)
    size = weights[f"w{len(sizes) - 1}"].end
    some = named(weights, *data.draw(st.sets(st.integers(0, len(sizes) - 1))))
    most = PAGE * data.draw(st.integers(1, 40))
    layout = lay_out(some)
    chunks = cut_chunks([layout], size=size, most=most, whole=data.draw(st.booleans()))
    assert all(c.start % PAGE == 0 and c.stop <= size for c in chunks)
    assert all(0 < c.stop - c.start <= most for c in chunks)
    assert all(a.stop <= b.start for a, b in pairwise(chunks))
    came: dict[int, int] = {}  # byte of the device -> byte of the file, at a weight's ends
    ends = {b for w in some.values() if w.nbytes for b in (w.offset, w.end - 1)}
    taken: list[tuple[int, int]] = []
    for chunk, parts in zip(chunks, copies(chunks, layout), strict=True):
        for part in parts:
            first = chunk.start + part.source
            assert first + part.size <= chunk.stop
            assert part.target + part.size <= layout.size
            taken.append((part.target, part.target + part.size))
            came |= {part.target + b - first: b for b in ends if first <= b < first + part.size}
    taken.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(taken)), "no byte is written twice"
    for name, weight in some.items():
        target = layout.offsets[name]
        assert target % ALIGNMENT == 0
        if weight.nbytes:
            assert came[target] == weight.offset
            assert came[target + weight.nbytes - 1] == weight.end - 1
    places = sorted((layout.offsets[n], w.nbytes) for n, w in some.items() if w.nbytes)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(places))


def test_large_weights_travel_in_one_run_and_small_ones_cost_little() -> None:
    layout = lay_out(in_a_file([2 * MIB + 100, 3 * MIB, MIB, 64, 64, 64]))
    assert len(layout.runs) == 3, "the large ones and the first small one; then one each"
    assert layout.size < 6 * MIB + 2 * PAGE + 4 * ALIGNMENT


def test_two_names_of_the_same_bytes_share_an_address() -> None:
    layout = lay_out({"a": ref(64, 100), "b": ref(64, 100), "c": ref(4096, 8)})
    assert layout.offsets["a"] == layout.offsets["b"]
    assert [(r.start, r.stop) for r in layout.runs if r.start == 64] == [(64, 164)]


def test_bytes_that_nobody_asked_for_are_not_read() -> None:
    weights = in_a_file([MIB] * 8)
    layout = lay_out(named(weights, 0, 7))
    chunks = cut_chunks([layout], size=8 * MIB, most=4 * MIB, whole=False)
    assert chunks == [Chunk(0, MIB), Chunk(7 * MIB, 8 * MIB)]
    every = cut_chunks([layout], size=8 * MIB, most=MIB, whole=True)
    assert sum(c.stop - c.start for c in every) == 8 * MIB


def test_what_two_devices_need_is_read_once() -> None:
    weights = in_a_file([MIB] * 4)
    both = [lay_out(named(weights, 0, 1, 2)), lay_out(named(weights, 2, 3))]
    assert cut_chunks(both, size=4 * MIB, most=4 * MIB, whole=False) == [Chunk(0, 4 * MIB)]


def test_nothing_to_load_is_nothing_to_read() -> None:
    layout = lay_out({})
    assert (layout.size, layout.runs) == (0, ())
    assert cut_chunks([layout], size=0, most=PAGE, whole=True) == []
    assert copies([], layout) == []


@pytest.mark.parametrize("run", [Run(0, 10, 0), Run(4000, 9000, 256)])
def test_a_run_is_split_where_chunks_end(run: Run) -> None:
    layout = lay_out({"w": ref(run.start, run.stop - run.start)})
    chunks = cut_chunks([layout], size=run.stop, most=PAGE, whole=False)
    sizes = [sum(c.size for c in some) for some in copies(chunks, layout)]
    assert sum(sizes) == run.stop - run.start
    assert len(chunks) == -(-run.stop // PAGE) - run.start // PAGE
