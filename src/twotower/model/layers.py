"""Norms, the squared-ReLU MLP and the mixture of experts."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from twotower.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32, cast back to x's dtype."""

    def __init__(
        self,
        size: int,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale * self.weight.float()).to(x.dtype)


class MLP(nn.Module):
    """down(relu(up(x))^2), without a gate."""

    def __init__(
        self,
        size: int,
        width: int,
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Router(nn.Module):
    """The gate's parameters: `weight` [E,D] and `e_score_correction_bias` [E], used in float64."""

    def __init__(
        self,
        experts: int,
        size: int,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(experts))


class MoE(nn.Module):
    """Top-k routed experts plus one shared expert."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.gate = Router(c.n_routed_experts, c.hidden_size)
        self.experts = nn.ModuleList(
            MLP(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts)
        )
        self.shared_experts = (
            MLP(c.hidden_size, c.shared_intermediate) if c.shared_intermediate else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(tokens)
        # Results lie expert by expert and are put back by one gather: adding them up row by row is
        # many times slower on a CPU.
        order = chosen.flatten().argsort(stable=True)
        rows = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = zip(
            self.experts,
            tokens[rows].split(counts),
            strict=True,
        )
        results = torch.cat([expert(part) for expert, part in parts if len(part)]).float()
        out = (results[order.argsort()].unflatten(0, chosen.shape) * weights[..., None]).sum(1)
        routed = out.to(x.dtype).reshape(x.shape)
        if self.shared_experts is None:
            return routed
        return routed + self.shared_experts(x)

    def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [N,k] float32 and chosen experts [N,k] of tokens [N,D].

        In float64, like the published code, so that correct implementations agree on borderline
        choices.
        """
        c = self.config
        scores = torch.sigmoid(tokens.double() @ self.gate.weight.double().T)
        choice = scores + self.gate.e_score_correction_bias.double()
        if c.n_group > 1:
            groups = choice.unflatten(-1, (c.n_group, -1))
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter(
                -1, best.topk(c.topk_group, -1).indices, True
            )
            choice = groups.masked_fill(~kept[..., None], -math.inf).flatten(-2)
        chosen = choice.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return (weights * c.routed_scaling_factor).float(), chosen
