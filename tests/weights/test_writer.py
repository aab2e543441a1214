"""Converting weights between float dtypes gives torch's bits, for any bits, in any pieces."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.checkpoint.shard import Tensor
from twotower.errors import CheckpointError, ExportError
from twotower.weights.writer import convert_chunks

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PAIRS = list(itertools.product(DTYPES, DTYPES))
LARGEST_FLOAT16 = 65504.0
# What follows the upper half of a float32: nothing, the last and the halfway bits of bfloat16 (16
# dropped) and float16 (13
# dropped), each with its neighbours.
LOWER_HALVES = (
    0x0000,
    0x0001,
    0x0FFF,
    0x1000,
    0x1001,
    0x1FFF,
    0x2000,
    0x2FFF,
    0x3000,
    0x3001,
    0x7FFF,
    0x8000,
    0x8001,
    0xFFFF,
)


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
    """Without the finite values that would become infinite in float16: those are refused, not converted."""
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


NAMED = [
    # source, target, value, what it becomes; a halfway case goes to the even neighbour
    ("float32", "bfloat16", 0x3F808000, 0x3F80),
    ("float32", "bfloat16", 0x3F818000, 0x3F82),
    ("float32", "bfloat16", 0x3F808001, 0x3F81),
    ("float32", "bfloat16", 0x00000001, 0x0000),
    ("float32", "bfloat16", 0x00008001, 0x0001),
    ("float32", "bfloat16", 0x80000000, 0x8000),
    ("float32", "bfloat16", 0xFF800000, 0xFF80),
    ("float32", "float16", 0x3F801000, 0x3C00),
    ("float32", "float16", 0x3F803000, 0x3C02),
    ("float32", "float16", 0x33800000, 0x0001),
    ("float32", "float16", 0x33000000, 0x0000),
    ("float32", "float16", 0x33000001, 0x0001),
    ("float32", "float16", 0x80000000, 0x8000),
    ("float32", "float16", 0x7F800000, 0x7C00),
    ("float32", "float16", 0x477FEFFF, 0x7BFF),
    ("float16", "float32", 0x0001, 0x33800000),
    ("float16", "float32", 0x8000, 0x80000000),
    ("float16", "float32", 0xFC00, 0xFF800000),
    ("float16", "bfloat16", 0x3C04, 0x3F80),
    ("float16", "bfloat16", 0x3C0C, 0x3F82),
    ("bfloat16", "float16", 0x8000, 0x8000),
    ("bfloat16", "float16", 0x3380, 0x0001),
    ("bfloat16", "float32", 0x0001, 0x00010000),
]


def test_rounding_goes_to_the_nearest_and_ties_to_even(folder: Path) -> None:
    """Written out, so that the comparison with torch does not rest on torch alone."""
    for source, target, value, becomes in NAMED:
        (piece,) = convert_chunks(
            stored(folder, np.array([value]), source), target, chunk_bytes=100
        )
        assert np.frombuffer(piece, unsigned(target)).tolist() == [becomes], (
            source,
            target,
            hex(value),
        )


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


def brain(*values: float) -> np.ndarray:
    return floats(*values) >> 16


@pytest.mark.parametrize(
    ("source", "bits", "largest"),
    [
        ("float32", floats(65520.0), "65520"),
        ("float32", floats(-65520.0), "65520"),
        ("float32", floats(1.0, 70000.0, -1e6, 80000.0), "1e+06"),
        ("float32", floats(70000.0, *[0.0] * 50, -3e30), "3e+30"),
        ("float32", floats(*[1.0] * 50, 70000.0, *[2.0] * 50), "70000"),
        ("float32", floats(np.inf, 70000.0, -np.inf, np.nan, 66000.0), "70000"),
        ("bfloat16", brain(65536.0, *[1.0] * 50, 131072.0), "131072"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [4, 16, 1 << 20])
def test_overflow_names_the_tensor_and_its_largest_magnitude(
    folder: Path, source: str, bits: np.ndarray, largest: str, chunk_bytes: int
) -> None:
    """The largest of the whole tensor, wherever the first value lies that is too large."""
    with pytest.raises(ExportError, match=r"tower\.weight does not fit float16") as caught:
        list(convert_chunks(stored(folder, bits, source), "float16", chunk_bytes=chunk_bytes))
    assert f"magnitude {largest};" in caught.value.found
    assert "65504" in caught.value.found
    assert "--dtype bfloat16" in caught.value.do


def test_the_largest_values_that_fit_are_converted(folder: Path) -> None:
    """Up to halfway to the next power of two; an infinity that was stored as one is kept."""
    below = float(np.nextafter(np.float32(65520), np.float32(0)))
    (piece,) = convert_chunks(
        stored(folder, floats(65504.0, below, -below, np.inf), "float32"),
        "float16",
        chunk_bytes=100,
    )
    assert np.frombuffer(piece, np.float16).tolist() == [
        LARGEST_FLOAT16,
        LARGEST_FLOAT16,
        -LARGEST_FLOAT16,
        np.inf,
    ]


@pytest.mark.parametrize("target", DTYPES)
def test_a_shard_that_became_shorter_is_an_error(folder: Path, target: str) -> None:
    tensor = stored(folder, floats(*[1.0] * 100), "float32")
    with tensor.file.open("r+b") as file:
        file.truncate(tensor.offset + 250)
    with pytest.raises(CheckpointError, match=r"tower\.weight"):
        list(convert_chunks(tensor, target, chunk_bytes=64))
