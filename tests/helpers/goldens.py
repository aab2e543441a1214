"""Texts of the references, and what every engine must make of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.helpers.graphs import FIXTURES
from tests.helpers.towers import golden_config
from twotower.config import GenerationConfig
from twotower.runtime import Request

DIFFUSION = GenerationConfig(max_new_tokens=40, confidence_threshold=0.5, ignore_eos=True)
AR = GenerationConfig(mode="ar", max_new_tokens=24, ignore_eos=True)


def golden_cases(folder: str) -> list[dict[str, Any]]:
    """Those of a fixture that engines for blocks of 16 and 256 positions can run."""
    return [
        c
        for c in json.loads((FIXTURES / folder / "golden.json").read_text())
        if c["params"]["block_size"] == 16
        and len(c["prompt"]) + c["params"]["max_new_tokens"] <= 256
    ]


def check_golden(model: Any, case: dict[str, Any], **options: Any) -> None:
    """The denoiser's text of one case, in as many passes."""
    out = model.generate(case["prompt"], golden_config(case), **options)
    assert (list(out.tokens), out.usage.nfe) == (case["diffusion_tokens"], case["nfe"])


def check_goldens(model: Any, cases: list[dict[str, Any]]) -> None:
    """Every case in both modes, alone and in one batch."""
    for case in cases:
        check_golden(model, case)
        assert list(model.generate(case["prompt"], AR).tokens) == case["ar_greedy_tokens"]
    together = model.generate([Request(c["prompt"], golden_config(c)) for c in cases])
    assert [list(out.tokens) for out in together] == [c["diffusion_tokens"] for c in cases]


def random_prompt(length: int, seed: int | None = None) -> list[int]:
    """Token ids of a fixture's vocabulary."""
    return np.random.default_rng(length if seed is None else seed).integers(4, 250, length).tolist()


def check_rows(model: Any, prompts: list[list[int]], options: GenerationConfig) -> None:
    """Each row of a batch is what it is alone."""
    alone = [model.generate(p, options).tokens for p in prompts]
    assert [out.tokens for out in model.generate(prompts, options)] == alone
