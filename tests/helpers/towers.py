"""The torch towers of a fixture, loaded once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tests.helpers.graphs import FIXTURES, fixture_weights
from twotower.config import GenerationConfig, read_model_config
from twotower.model import ContextTower, DenoiserTower, empty_state
from twotower.model.loading import load_context_tower, load_denoiser_tower


@cache
def towers(folder: str, dtype: str = "float32") -> tuple[ContextTower, DenoiserTower]:
    """Both towers of a fixture in one dtype."""
    path = FIXTURES / folder
    config, tensors = read_model_config(path / "config.json"), fixture_weights(path)

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(tensors[name])

    return load_context_tower(config, read, dtype), load_denoiser_tower(config, read, dtype)


def golden_config(case: dict[str, Any]) -> GenerationConfig:
    """A golden case's parameters as options; the reference handles no end of sequence."""
    options = {name: v for name, v in case["params"].items() if name != "mask_token_id"}
    return GenerationConfig(**options, ignore_eos=True)


def read(
    context: ContextTower,
    tokens: torch.Tensor,
    dtype: str = "float32",
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Last hidden values and state of texts that begin here."""
    state = empty_state(context.config, len(tokens), tokens.shape[1] + 64, dtype)
    past = torch.zeros(len(tokens), dtype=torch.int64)
    return context.extend(tokens, state, past=past, lengths=lengths)
