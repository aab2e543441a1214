"""The denoiser tower: predicts a whole block at once from the context tower's state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from twotower.checkpoint.layout import TIMESTEP_FREQUENCIES
from twotower.config import LayerKind, ModelConfig
from twotower.model.attention import Attention
from twotower.model.context_tower import Layer
from twotower.model.layers import RMSNorm
from twotower.model.mamba import Mamba2
from twotower.model.state import ContextState
from twotower.spec import candidate_count, past_conv, past_key, past_ssm, past_value


@dataclass(frozen=True, slots=True)
class Step:
    """One step: next_block, predicted [B,S], masked_left [B] int64, confidence [B,S] float32."""

    next_block: torch.Tensor
    predicted: torch.Tensor
    confidence: torch.Tensor
    masked_left: torch.Tensor


class TimestepEmbedder(nn.Module):
    """The time-step embedding's two linear layers, under their published names."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * TIMESTEP_FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size)
        )


class DenoiserTower(nn.Module):
    """Embeddings, conditioned layers, final norm and head; the published names under one roof."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        d = c.hidden_size
        self.embeddings = nn.Embedding(c.vocab_size, d)
        self.layers = nn.ModuleList(Layer(c, kind) for kind in c.layers)
        self.norm_f = RMSNorm(d, c.layer_norm_epsilon)
        self.lm_head = nn.Linear(d, c.vocab_size, bias=False)
        self.t_embedder = TimestepEmbedder(d)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(d, 3 * d))
        self.scale_shift_tables = nn.ParameterList(torch.empty(3, d) for _ in c.layers)

    def logits(
        self,
        block: torch.Tensor,
        state: ContextState,
        *,
        context_length: torch.Tensor,
    ) -> torch.Tensor:
        """Float32 logits [B,S,V] of a block [B,S] with masks in it; the state is only read."""
        h = self.embeddings(block)
        shared = self._conditioning((block == self.config.mask_token_id).float().mean(-1))
        layers = zip(
            cast("Iterable[Layer]", self.layers),
            self.config.layers,
            strict=True,
        )
        for i, (layer, kind) in enumerate(layers):
            by = (shared + self.scale_shift_tables[i]).unsqueeze(2)
            shift, scale, gate = by.unbind(1)  # [B,1,D] each
            if kind in (LayerKind.MAMBA, LayerKind.ATTENTION):
                u = layer.norm(h * (1 + scale) + shift)
            else:
                u = layer.norm(h) * (1 + scale) + shift
            h = h + gate * self._mix(layer.mixer, u, state, i, context_length)
        return self.lm_head(self.norm_f(h)).float()

    def _mix(
        self,
        mixer: nn.Module,
        u: torch.Tensor,
        state: ContextState,
        i: int,
        length: torch.Tensor,
    ) -> torch.Tensor:
        if isinstance(mixer, Mamba2):
            return mixer(u, state[past_conv(i)], state[past_ssm(i)])[0]
        if isinstance(mixer, Attention):
            return mixer.over_context(
                u,
                state[past_key(i)],
                state[past_value(i)],
                length,
            )
        out: torch.Tensor = mixer(u)
        return out

    def _conditioning(self, t: torch.Tensor) -> torch.Tensor:
        """The conditioning [B,3,D] all layers share, from the masked fraction t [B]."""
        dtype = self.lm_head.weight.dtype
        # The published model rounds t to its own dtype before the factor 1000.
        t = t.to(dtype).float()
        steps = torch.arange(TIMESTEP_FREQUENCIES, dtype=torch.float32)
        rates = torch.exp(-math.log(10000.0) * steps / TIMESTEP_FREQUENCIES)
        angles = (t * 1000.0)[:, None] * rates
        e = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))
        out: torch.Tensor = self.t_block(e).unflatten(-1, (3, -1))
        return out


@torch.inference_mode()
def commit_step(
    logits: torch.Tensor,
    block: torch.Tensor,
    c: ModelConfig,
    *,
    threshold: torch.Tensor,
    commit_floor: torch.Tensor,
    temperature: torch.Tensor,
    noise: torch.Tensor,
) -> Step:
    """Predictions, their confidence and which are committed, as the denoiser graph's tail has it.

    `logits` are [B,S,V] float32, `block` [B,S] int64; `noise` [B,S,K] is added to the K best
    tempered logits. Of each row [B]: commit what is more confident than `threshold`, and at least
    `commit_floor` tokens; `temperature` 0 is greedy.
    """
    masked = block == c.mask_token_id
    logits = logits.clone()
    logits[..., c.mask_token_id] = -math.inf
    best = logits.topk(candidate_count(c), -1)
    cold = (temperature <= 0)[:, None, None]
    noisy = (
        best.values
        / torch.where(
            cold,
            torch.ones(()),
            temperature[:, None, None],
        )
        + noise
    )
    place = torch.where(
        cold,
        torch.zeros((), dtype=torch.int64),
        noisy.argmax(-1, keepdim=True),
    )
    predicted = best.indices.gather(-1, place)[..., 0]
    confidence = F.softmax(logits, -1).gather(-1, predicted[..., None])[..., 0]
    count = torch.maximum(
        ((confidence > threshold[:, None]) & masked).sum(-1), commit_floor.clamp(min=1)
    )
    order = torch.where(masked, confidence, -math.inf).argsort(
        dim=-1,
        descending=True,
        stable=True,
    )
    rank = torch.empty_like(order).scatter(
        -1,
        order,
        torch.arange(block.shape[1]).expand_as(order),
    )
    commit = masked & (rank < count[:, None])
    after, left = torch.where(commit, predicted, block), (masked & ~commit).sum(-1)
    return Step(after, predicted, confidence, left)
