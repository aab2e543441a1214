"""Towers filled from a checkpoint tensor by tensor, without random weights first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from twotower.checkpoint.layout import Tower
from twotower.config import ModelConfig
from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.state import TORCH_DTYPES

T = TypeVar("T", ContextTower, DenoiserTower)
Read = Callable[[str], torch.Tensor]
"""A checkpoint tensor by its published name."""

# Used in float32 whatever the model's dtype, and so never rounded to it.
_HIGH_PRECISION = (
    "A_log",
    "D",
    "dt_bias",
    "gate.weight",
    "e_score_correction_bias",
    "norm.weight",
    "norm_f.weight",
)


def load_context_tower(
    config: ModelConfig,
    read: Read,
    dtype: str = "float32",
    *,
    rounded_to: str | None = None,
) -> ContextTower:
    """The context tower with its head, computing in `dtype`; `read` takes published tensor names.

    `rounded_to` rounds the weights first: the exact twin of a half-precision model.
    """
    tower = _empty(ContextTower, config)
    _fill(
        tower,
        lambda name: read(published_name(name, Tower.CONTEXT)),
        dtype,
        rounded_to or dtype,
    )
    return tower


def load_denoiser_tower(
    config: ModelConfig,
    read: Read,
    dtype: str = "float32",
    *,
    rounded_to: str | None = None,
) -> DenoiserTower:
    """The denoiser tower with its conditioning and head; arguments as of `load_context_tower`."""
    tower = _empty(DenoiserTower, config)
    _fill(
        tower, lambda name: read(published_name(name, Tower.DENOISER)), dtype, rounded_to or dtype
    )
    return tower


def published_name(name: str, tower: Tower) -> str:
    """A parameter's published name: the head and the conditioning carry no tower prefix."""
    if name.startswith("lm_head."):
        return tower.head
    conditioning = ("t_embedder.", "t_block.", "scale_shift_tables.")
    if name.startswith(conditioning):
        return name
    return f"{tower.value}.{name}"


def _empty(kind: type[T], config: ModelConfig) -> T:
    """Shapes alone: random numbers for 30 billion weights would take minutes and all the memory."""
    with torch.device("meta"):
        return kind(config).eval()


def _fill(
    tower: nn.Module,
    read: Read,
    dtype: str,
    rounded_to: str,
) -> None:
    for name, parameter in list(tower.named_parameters()):
        rounded, kept = rounded_to, dtype
        if name.endswith(_HIGH_PRECISION):
            rounded = kept = "float32"
        value = read(name).to(TORCH_DTYPES[rounded]).to(TORCH_DTYPES[kept])
        assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
        owner_name, _, last = name.rpartition(".")
        owner = tower.get_submodule(owner_name) if owner_name else tower
        if isinstance(owner, nn.ParameterList):
            owner[int(last)] = nn.Parameter(value, requires_grad=False)
        else:
            setattr(owner, last, nn.Parameter(value, requires_grad=False))
