"""Rows on a device: a batch is padded, and neither padding nor other rows change a bit of a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.goldens import DIFFUSION, random_prompt
from tests.helpers.trt.install import bundle_with_engines
from twotower import GenerationConfig
from twotower.runtime import Request
from twotower.runtime.engines import trt_engine

Steps = dict[tuple[int, int], tuple[bytes, ...]]


@st.composite
def requests(draw: Any) -> Request:
    """A prompt with options of its own."""
    config = GenerationConfig(
        max_new_tokens=draw(st.sampled_from([1, 16, 30, 48])),
        confidence_threshold=draw(st.sampled_from([0.02, 0.5, 1.0])),
        steps_per_block=draw(st.sampled_from([1, 4, 16])),
        temperature=draw(st.sampled_from([0.0, 0.9])),
        seed=draw(st.integers(0, 9)),
        ignore_eos=True,
    )
    return Request(draw(st.lists(st.integers(4, 250), min_size=2, max_size=40)), config)


def generated(model: Any, batch: list[Request]) -> list[tuple[tuple[int, ...], Steps]]:
    """Each row's tokens, and what the denoiser made of it in every step, to the bit."""
    steps: list[Steps] = [{} for _ in batch]

    def on_step(record: Any) -> None:
        assert record.block_in.shape[0] == len(record.rows) == len(batch), "padding is nobody's"
        for place, row in enumerate(record.rows):
            if row >= 0:
                arrays = (record.block_in, record.predicted, record.confidence, record.next_block)
                bits = tuple(a[place].tobytes() for a in arrays)
                steps[row][record.block_index, record.step] = bits

    results = model.generate(batch, on_step=on_step)
    return [(result.tokens, own) for result, own in zip(results, steps, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_other_rows_nor_padding_change_a_bit_of_a_row(
    opened: Any, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """A row alone is padded to four here, and prompts have two tokens or more.

    ONNX Runtime, which computes, sums a product of a single row in another order than one of
    several. That is its arithmetic and not the runtime's, and would be all that is seen.
    """
    monkeypatch.setattr(trt_engine, "row_counts", lambda most: (most,))
    with opened("hybrid-b", dtype=dtype) as it:

        @settings(max_examples=12, suppress_health_check=list(HealthCheck))
        @given(st.lists(requests(), min_size=2, max_size=4))
        def holds(batch: list[Request]) -> None:
            together = generated(it.model, batch)
            alone = [generated(it.model, [request])[0] for request in batch]
            assert together == alone

        holds()


@pytest.mark.parametrize(("rows", "bound"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_a_batch_is_padded_to_few_numbers_of_rows(opened: Any, rows: int, bound: int) -> None:
    with opened() as it:
        out = it.model.generate(
            [[5, 6, 7]] * rows,
            GenerationConfig(max_new_tokens=20, ignore_eos=True),
        )
        assert len(out) == rows
        assert it.model._workspaces._idle.rows == bound


def test_a_workspace_serves_fewer_rows_after_more(opened: Any) -> None:
    """What the fourth row left in the small arrays is gone: padding has no masks and no text."""
    options = replace(DIFFUSION, temperature=0.8, seed=3)
    prompts = [random_prompt(9 + n) for n in range(4)]
    with opened() as it:
        alone = [it.model.generate(p, options).tokens for p in prompts]
        assert [out.tokens for out in it.model.generate(prompts, options)] == alone
        assert [out.tokens for out in it.model.generate(prompts[:3], options)] == alone[:3]
        work = it.model._workspaces._idle
        for name, whole in work._denoiser_arrays._whole.items():
            if name not in ("next_block", "predicted", "confidence", "masked_left"):
                assert (whole[3:] == (name == "block") * work.unmasked).all(), name
        assert (it.towers.memory.host(work._buffers["chunk_length"])[3:] == 0).all()


def test_engines_for_many_rows(opened: Any, tmp_path: Path) -> None:
    """Of 32: nine rows run as sixteen, and are what each is alone."""
    bundle = bundle_with_engines("hybrid-b", tmp_path / "bundle", max_batch=32)
    prompts = [random_prompt(3 + 2 * n) for n in range(9)]
    with opened(bundle, max_batch=32) as it:
        together = [out.tokens for out in it.model.generate(prompts, DIFFUSION)]
        assert it.model._workspaces._idle.rows == 16
        assert together == [it.model.generate(p, DIFFUSION).tokens for p in prompts]
