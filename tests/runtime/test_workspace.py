"""Buffers and bindings: made once, shared in place, grown with what they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.fake_engines import FakeTowers, fake_towers
from twotower.dtypes import carried_dtype
from twotower.errors import RequestError
from twotower.runtime.device import HostMemory
from twotower.runtime.workspace import ContextState, Workspace
from twotower.spec import TensorSpec, past_conv, past_key, past_ssm, present_key, present_ssm


def state(dtype: str = "float32", rows: int = 2, capacity: int = 256) -> ContextState:
    towers = replace(fake_towers().towers, dtype=dtype)
    return ContextState(towers, rows=rows, capacity=capacity)


def read(work: Workspace, tokens: list[int], past: int) -> None:
    work.tokens(len(tokens))[...] = tokens
    work.past_length[:], work.chunk_length[:] = past, len(tokens)
    work.extend(len(tokens))


def workspace() -> tuple[Workspace, FakeTowers]:
    fake = fake_towers()
    return Workspace(fake.towers, rows=1, capacity=256), fake


@pytest.mark.parametrize(
    ("dtype", "kept_as"),
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "uint16"), ("int64", "int64")],
)
def test_buffers_have_the_dtype_of_the_contract(dtype: str, kept_as: str) -> None:
    assert carried_dtype(dtype) == kept_as
    buffer = HostMemory().state(TensorSpec("x", dtype, ("B", 3)), {"B": 2})
    assert (buffer.shape, str(buffer.dtype)) == ((2, 3), kept_as)
    assert buffer.flags.c_contiguous
    assert not buffer.any()


def test_no_memory_is_named() -> None:
    key = TensorSpec("past_key_values.0.key", "float32", ("B", 2, "T", 4))
    says = r"not enough memory for 8 row\(s\) at a context capacity of 4503599627370496 tokens"
    with pytest.raises(RequestError, match=says):
        HostMemory().state(key, {"B": 8, "T": 2**52})


def test_keys_are_shared_and_mamba_states_alternate() -> None:
    s = state("float16")
    for which in (0, 1):
        reads, writes = s.reads(which), s.writes(which)
        assert reads[past_key(0)] is writes[present_key(0)] is s.reads(1 - which)[past_key(0)]
        assert reads[past_ssm(1)] is not writes[present_ssm(1)]
        assert writes[present_ssm(1)] is s.reads(1 - which)[past_ssm(1)]
    assert [s.reads(0)[name].dtype for name in (past_conv(1), past_ssm(1))] == ["f2", "f4"]


def test_growing_keeps_what_was_written_and_clearing_forgets_it() -> None:
    s = state()
    s.reads(0)[past_key(0)][:, :, :7] = 5
    s.reads(1)[past_ssm(1)].fill(3)
    s.moved_on(7)
    s.grow(512)
    key = s.reads(0)[past_key(0)]
    assert s.capacity == key.shape[2] == 512
    assert key[:, :, :7].min() == 5
    assert not key[:, :, 7:].any()
    assert s.reads(s.current)[past_ssm(1)].min() == 3
    s.clear()
    assert s.current == 0
    assert not any(buffer.any() for buffer in s.reads(0).values())


def test_the_denoiser_reads_what_the_context_wrote_last() -> None:
    work, _ = workspace()
    arrays = work.denoiser(4)
    arrays.block.fill(3)
    seen = []
    for past, tokens in ((0, [5, 6]), (2, [7]), (3, [8])):
        read(work, tokens, past)
        arrays.context_length[:] = past + len(tokens)
        work.denoise()
        seen.append(arrays.predicted.tolist())
    fresh, _ = workspace()
    read(fresh, [5, 6, 7, 8], 0)
    again = fresh.denoiser(4)
    again.block.fill(3)
    again.context_length[:] = 4
    fresh.denoise()
    assert seen[-1] == again.predicted.tolist()
    assert seen[0] != seen[1] != seen[2]


def test_bindings_are_made_once_for_each_width_and_state_set() -> None:
    work, fake = workspace()
    work.denoiser(4)
    for past in range(0, 40, 4):
        read(work, [5, 6, 7, 8], past)
        work.denoise()
        work.denoise()
        work.head()
    engines = fake.context, fake.denoiser, fake.head
    assert [(e.binds, len(e.addresses)) for e in engines] == [(2, 2), (2, 2), (1, 1)]
    work.denoiser(8)
    work.denoise()
    assert fake.denoiser.binds == 3, "another block size has other arrays"


def test_bindings_of_odd_widths_do_not_pile_up() -> None:
    work, fake = workspace()
    for width in range(1, 21):
        for _ in range(2):
            read(work, [5] * width, 0)
    assert fake.context.binds == 40
    assert len(work._context) <= 32
