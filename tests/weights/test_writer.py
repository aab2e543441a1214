"""Data files: aligned, hashed, told of as they grow; and converted weights have torch's bits."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.errors import fails
from twotower.checkpoint.shard import Tensor
from twotower.errors import ExportError
from twotower.files import FileRecord
from twotower.weights.mapped import read_weight
from twotower.weights.refs import WeightRef, place
from twotower.weights.writer import Piece, convert_chunks, write_data

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PAIRS = list(itertools.product(DTYPES, DTYPES))
# Lower halves of a float32: nothing, the last and the halfway bits of what bfloat16 (16) and
# float16 (13) drop, each with its neighbours.
LOWER_HALVES = (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000,
                0x8001, 0xFFFF)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for every example that hypothesis draws."""
    return tmp_path_factory.mktemp("tensors")


def unsigned(dtype: str) -> np.dtype[Any]:
    return np.dtype(f"u{DTYPES[dtype].itemsize}")


def stored(folder: Path, bits: np.ndarray, dtype: str) -> Tensor:
    """A tensor of these bits, behind bytes of something else."""
    path = folder / "shard"
    path.write_bytes(b"before" + bits.astype(unsigned(dtype)).tobytes())
    return Tensor(
        "tower.weight", dtype, bits.shape, path, len(b"before"), bits.size * DTYPES[dtype].itemsize
    )


def as_torch(bits: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.astype(unsigned(dtype))).view(DTYPES[dtype])


def in_range(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """Without the finite values that would become infinite in float16: those are refused."""
    if target != "float16":
        return bits
    before = as_torch(bits, source)
    return bits[(before.to(torch.float16).isinf() <= before.isinf()).numpy()]


def assert_converts_as_torch(
    folder: Path, bits: np.ndarray, source: str, target: str, *, chunk_bytes: int
) -> None:
    bits = in_range(bits, source, target)
    got = b"".join(
        bytes(memoryview(p).cast("B"))
        for p in convert_chunks(stored(folder, bits, source), target, chunk_bytes=chunk_bytes)
    )
    want = as_torch(bits, source).to(DTYPES[target])
    ours = np.frombuffer(got, unsigned(target))
    nan = want.isnan().numpy()
    np.testing.assert_array_equal(as_torch(ours, target).isnan().numpy(), nan)
    # Which NaN it is has no meaning (torch itself gives different ones in its vector and its scalar
    # code).
    np.testing.assert_array_equal(
        ours[~nan], want.view(torch.from_numpy(ours[:0].copy()).dtype).numpy()[~nan]
    )


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_bit_pattern_converts_as_in_torch(folder: Path, source: str, target: str) -> None:
    """All of 16 bits; of 32 bits every upper half with the lower halves that decide a rounding."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    bits = (
        upper
        if source != "float32"
        else ((upper[:, None] << 16) | np.array(LOWER_HALVES, np.uint32)).reshape(-1)
    )
    assert_converts_as_torch(folder, bits, source, target, chunk_bytes=1 << 20)


@settings(max_examples=100)
@given(pair=st.sampled_from(PAIRS), chunk_bytes=st.integers(1, 300), data=st.data())
def test_any_bits_convert_as_in_torch_in_any_pieces(
    folder: Path, pair: tuple[str, str], chunk_bytes: int, data: st.DataObject
) -> None:
    """A piece stands for whole elements, one at least, and for no more bytes than asked for."""
    source, target = pair
    pattern = st.integers(0, (1 << 8 * DTYPES[source].itemsize) - 1)
    bits = in_range(np.array(data.draw(st.lists(pattern, max_size=50)), np.uint32), source, target)
    assert_converts_as_torch(folder, bits, source, target, chunk_bytes=chunk_bytes)
    pieces = convert_chunks(stored(folder, bits, source), target, chunk_bytes=chunk_bytes)
    sizes = [memoryview(piece).nbytes // DTYPES[target].itemsize for piece in pieces]
    assert max(sizes, default=0) == min(len(bits), max(1, chunk_bytes // DTYPES[source].itemsize))


# Source, target, value, what it becomes; a halfway case goes to the even neighbour.
NAMED = [
    ("float32", "bfloat16", 0x3F808000, 0x3F80),
    ("float32", "bfloat16", 0x3F818000, 0x3F82),
    ("float32", "bfloat16", 0x3F808001, 0x3F81),
    ("float32", "float16", 0x3F801000, 0x3C00),
    ("float32", "float16", 0x3F803000, 0x3C02),
    ("float32", "float16", 0x477FEFFF, 0x7BFF),
    ("float16", "bfloat16", 0x3C0C, 0x3F82),
    ("bfloat16", "float16", 0x3380, 0x0001),
]


def test_rounding_goes_to_the_nearest_and_ties_to_even(folder: Path) -> None:
    """Written out, so that the comparison with torch does not rest on torch alone."""
    for source, target, value, becomes in NAMED:
        tensor = stored(folder, np.array([value]), source)
        (piece,) = convert_chunks(tensor, target, chunk_bytes=100)
        assert np.frombuffer(piece, unsigned(target)).tolist() == [becomes], hex(value)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("chunk_bytes", [4, 16, 1 << 20])
@pytest.mark.parametrize(
    ("source", "bits", "largest"),
    [
        ("float32", floats(-65520.0), "65520"),
        ("float32", floats(1.0, 70000.0, -1e6, 80000.0), "1e+06"),
        ("float32", floats(70000.0, *[0.0] * 50, -3e30), "3e+30"),
        ("float32", floats(*[1.0] * 50, np.inf, 70000.0, np.nan, *[2.0] * 50, 66000.0), "70000"),
        ("bfloat16", floats(65536.0, *[1.0] * 50, 131072.0) >> 16, "131072"),
    ],
)
def test_overflow_names_the_tensor_and_its_largest_magnitude(
    folder: Path, source: str, bits: np.ndarray, largest: str, chunk_bytes: int
) -> None:
    """The largest of the whole tensor, wherever the first value lies that is too large."""
    with fails(
        ExportError,
        r"tower\.weight does not fit float16",
        found=(f"magnitude {largest};", "65504"),
        do="--dtype bfloat16",
    ):
        list(convert_chunks(stored(folder, bits, source), "float16", chunk_bytes=chunk_bytes))


def test_a_data_file_is_aligned_hashed_and_told(tmp_path: Path) -> None:
    """Small weights lie on lines, large ones on pages; contents are asked for one after another."""
    places = place([("a", "float32", (3,)), ("b", "uint8", (1 << 20,)), ("c", "bfloat16", ())])
    assert [ref.offset for ref in places.values()] == [0, 4096, 4096 + (1 << 20)]
    contents = {
        "a": [floats(1.0), floats(2.0, 3.0).reshape(2, 1)],
        "b": [np.full(1 << 20, 7, np.uint8)],
        "c": [b"\x80\x3f"],
    }
    asked: list[str] = []

    def pieces(name: str) -> Iterator[Piece]:
        asked.append(name)
        yield from contents[name]

    told: list[int] = []
    record = write_data(tmp_path / "data", places, pieces, told.append)
    data = (tmp_path / "data").read_bytes()
    written = b"".join(bytes(memoryview(p).cast("B")) for some in contents.values() for p in some)
    assert data == written[:12] + bytes(4084) + written[12:]
    assert record == FileRecord(len(data), hashlib.sha256(data).hexdigest())
    assert (asked, told) == (["a", "b", "c"], [4, 8, 1 << 20, 2])
    with pytest.raises(AssertionError, match="a ends at 4"):
        write_data(tmp_path / "short", places, lambda name: contents[name][:1])


def test_pieces_of_rows_are_the_whole() -> None:
    """Of a stack in 4 bits, too: rows are counted through all axes but the last."""
    data = np.random.default_rng(0).integers(0, 256, 300, np.uint8)
    ref = WeightRef("int4", (3, 5, 6), 64)
    parts = [read_weight(data, part) for part in ref.split(4)]
    assert [len(part) for part in parts] == [4, 4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(parts).reshape(ref.shape), read_weight(data, ref))
