"""What twotower-tiny is, and how it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from twotower.config import LayerKind, ModelConfig
from twotower.model import ContextTower, DenoiserTower

__all__ = ["RECIPE", "Recipe", "initialise", "start_denoiser"]


def _config() -> ModelConfig:
    return ModelConfig(
        layers=tuple(LayerKind(letter) for letter in "M*EM*EM*E"),
        vocab_size=384,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=1,
        conv_kernel=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        moe_shared_expert_intermediate_size=128,
        routed_scaling_factor=1.0,
        max_position_embeddings=4096,
        dtype="float32",
    )


@dataclass(frozen=True)
class Recipe:
    """All numbers of the training; rates are learning rates."""

    config: ModelConfig = field(default_factory=_config)
    seed: int = 20261124
    block: int = 16
    chunk: int = 64
    context_rows: int = 64
    groups: int = 4
    denoiser_rows: int = 40
    context_steps: int = 3000
    labelled_steps: int = 900
    denoiser_steps: int = 5000
    matrix_rate: float = 0.008
    rate: float = 0.003
    balance_rate: float = 0.001
    prompt_weight: float = 0.1
    # The context tower first learns ten kinds of task evenly, then these; the denoiser learns these
    # alone. Left out are kinds in which
    # what stands at a place depends on all before it (how often a word was repeated, say): a block
    # of 16 at once is little help there.
    kinds: dict[str, float] = field(
        default_factory=lambda: {
            "flip": 1.3,
            "json": 1.0,
            "letter": 0.4,
            "lookup": 0.8,
            "sort": 0.5,
            "sums": 1.3,
            "words": 1.2,
        }
    )
    # The published defaults; on this model they keep all of the quality, and `twotower tune` finds
    # faster settings.
    generation: dict[str, float | int] = field(
        default_factory=lambda: {
            "block_size": 16,
            "steps_per_block": 16,
            "confidence_threshold": 0.9,
            "max_new_tokens": 128,
        }
    )


RECIPE = Recipe()


@torch.no_grad()
def initialise(tower: ContextTower) -> None:
    """Small normal matrices, smaller where they write into the residual stream; Mamba-2's own choice of time steps."""
    depth = math.sqrt(2 * len(RECIPE.config.layers))
    for name, p in tower.named_parameters():
        if name.endswith("A_log"):
            p.copy_(torch.linspace(1.0, 16.0, p.numel()).log())
        elif name.endswith("dt_bias"):
            step = torch.exp(torch.linspace(math.log(0.002), math.log(0.2), p.numel()))
            p.copy_(step + torch.log(-torch.expm1(-step)))
        elif name.endswith((".D", "norm.weight", "norm_f.weight")):
            p.fill_(1.0)
        elif name.endswith(("bias",)):
            p.zero_()
        elif name.endswith("conv1d.weight"):
            nn.init.uniform_(p, -0.5, 0.5)
        elif name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            nn.init.normal_(p, std=1 / (math.sqrt(p.shape[1]) * depth))
        elif name.startswith("embeddings"):
            nn.init.normal_(p, std=0.5)
        else:
            nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[1]))


@torch.no_grad()
def start_denoiser(denoiser: DenoiserTower, context: ContextTower) -> None:
    """The context tower's weights; conditioning that at first changes nothing: shift 0, scale 0, gate 1."""
    theirs = context.state_dict()
    for name, p in denoiser.named_parameters():
        if name in theirs:
            p.copy_(theirs[name])
        elif name.startswith("scale_shift_tables"):
            p.zero_()
            p[2] = 1.0
        elif name.startswith("t_block") or name.endswith("bias"):
            p.zero_()
        else:
            nn.init.normal_(p, std=1 / math.sqrt(p.shape[1]))
