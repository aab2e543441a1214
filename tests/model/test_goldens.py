"""The torch towers and the plain loop against results that no code of this project made."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors import safe_open

from tests.helpers.graphs import FIXTURES
from tests.helpers.towers import golden_config, read, towers
from twotower.config import GenerationConfig
from twotower.model.reference import reference_generate

CASES = [(folder, i) for folder in ("hybrid-a", "hybrid-b") for i in range(5)]


@cache
def goldens(folder: str) -> list[dict]:
    return json.loads((FIXTURES / folder / "golden.json").read_text())


@pytest.mark.parametrize(("folder", "index"), CASES)
def test_diffusion_is_the_reference_step_by_step(folder: str, index: int) -> None:
    case = goldens(folder)[index]
    assert case["min_margin"] > 1e-5
    out = reference_generate(towers(folder), case["prompt"], golden_config(case))
    assert out.tokens == case["diffusion_tokens"]
    assert len(out.steps) == case["nfe"]
    for got, want in zip(out.steps, case["steps"], strict=True):
        assert [got.block_in] == want["block_in"]
        assert [got.predicted] == want["predicted"]
        torch.testing.assert_close(
            torch.tensor([got.confidence]), torch.tensor(want["confidence"]), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(("folder", "index"), CASES)
def test_autoregression_is_the_reference(folder: str, index: int) -> None:
    case = goldens(folder)[index]
    config = GenerationConfig(mode="ar", max_new_tokens=24)
    out = reference_generate(towers(folder), case["prompt"], config)
    assert out.tokens == case["ar_greedy_tokens"]
    context = towers(folder)[0]
    hidden, _ = read(context, torch.tensor([case["prompt"]]))
    with safe_open(FIXTURES / folder / "golden.safetensors", "pt") as file:
        want = file.get_tensor(f"case{index}.context_last_logits").reshape(-1)
    torch.testing.assert_close(context.logits(hidden[0, -1]), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
def test_denoiser_logits_on_a_half_masked_block(folder: str) -> None:
    prompt = goldens(folder)[0]["prompt"]
    context, denoiser = towers(folder)
    _, state = read(context, torch.tensor([prompt]))
    with safe_open(FIXTURES / folder / "golden.safetensors", "pt") as file:
        block = file.get_tensor("case0.denoiser_block").reshape(1, -1).long()
        want = file.get_tensor("case0.denoiser_logits").reshape(1, block.shape[1], -1)
    got = denoiser.logits(block, state, context_length=torch.tensor([len(prompt)]))
    # Logits reach 100 here; 1e-5 of that is the float32 sum of a few hundred terms.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()) + 1e-5)
