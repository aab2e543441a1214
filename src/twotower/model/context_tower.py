"""The context tower: causal, reads chunks of tokens and carries the state on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from twotower.config import LayerKind, ModelConfig
from twotower.model.attention import Attention
from twotower.model.layers import MLP, MoE, RMSNorm
from twotower.model.mamba import Mamba2
from twotower.model.state import ContextState
from twotower.spec import candidate_count, past_conv, past_key, past_ssm, past_value


class Layer(nn.Module):
    """One layer: its norm and its mixer."""

    def __init__(
        self,
        c: ModelConfig,
        kind: LayerKind,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.mixer = mixer_for(c, kind)


def mixer_for(c: ModelConfig, kind: LayerKind) -> nn.Module:
    """The mixer of one layer kind, with uninitialised weights."""
    if kind is LayerKind.MAMBA:
        return Mamba2(c)
    if kind is LayerKind.ATTENTION:
        return Attention(c)
    if kind is LayerKind.MOE:
        return MoE(c)
    return MLP(c.hidden_size, c.intermediate_size)


class ContextTower(nn.Module):
    """Embeddings, layers, final norm and the autoregressive head."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, kind) for kind in c.layers)
        self.norm_f = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def extend(
        self,
        tokens: torch.Tensor,
        state: ContextState,
        *,
        past: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ContextState]:
        """Reads a right-padded chunk of tokens [B,L] int64 after `past` [B] others.

        `lengths` [B] are the valid tokens, None for all. Returns normed hidden vectors [B,L,D] of
        every position, and the new state; the old one is not changed.
        """
        new = dict(state)
        h = self.embeddings(tokens)
        for i, layer in enumerate(cast("Iterable[Layer]", self.layers)):
            u = layer.norm(h)
            if isinstance(layer.mixer, Mamba2):
                y, new[past_conv(i)], new[past_ssm(i)] = layer.mixer(
                    u, state[past_conv(i)], state[past_ssm(i)], lengths
                )
            elif isinstance(layer.mixer, Attention):
                y, new[past_key(i)], new[past_value(i)] = layer.mixer.causal(
                    u, state[past_key(i)], state[past_value(i)], past
                )
            else:
                y = layer.mixer(u)
            h = h + y
        return self.norm_f(h), new

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits of hidden vectors [..., D]."""
        return self.lm_head(hidden).float()

    @torch.inference_mode()
    def candidates(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best token ids and their log-probabilities, [B,K] each, best first."""
        best = torch.log_softmax(self.logits(hidden), -1).topk(candidate_count(self.config), -1)
        return best.indices, best.values


def last_valid(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Each row's hidden vector [B,D] at its last valid position of [B,L,D]."""
    return hidden[torch.arange(len(lengths)), (lengths - 1).clamp(min=0)]
