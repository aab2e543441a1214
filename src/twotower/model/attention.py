"""Grouped-query attention without positional encoding."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from twotower.config import ModelConfig


class Attention(nn.Module):
    """One set of projections; the towers differ in what they let a query see."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        linear = partial(nn.Linear, bias=False)
        queries, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = linear(c.hidden_size, queries)
        self.k_proj = linear(c.hidden_size, groups)
        self.v_proj = linear(c.hidden_size, groups)
        self.o_proj = linear(queries, c.hidden_size)

    def causal(
        self,
        u: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        past: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The context tower: u [B,L,D] sees everything up to itself.

        Keys and values are written at `past` [B] into new caches [B,KV,T,hd], returned with the
        output.
        """
        q, k, v = self._heads(u)
        slots = past[:, None] + torch.arange(u.shape[1])  # [B,L]
        where = slots[:, None, :, None].expand_as(k)
        keys, values = keys.scatter(2, where, k), values.scatter(2, where, v)
        mask = torch.arange(keys.shape[2]) <= slots[:, None, :, None]
        return self._attend(q, keys, values, mask), keys, values

    def over_context(
        self,
        u: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: torch.Tensor,
    ) -> torch.Tensor:
        """The denoiser: u [B,S,D] sees the first `length` [B] slots of the cache, and itself."""
        q, k, v = self._heads(u)
        cached = torch.arange(keys.shape[2]) < length[:, None, None, None]
        block = torch.ones(
            u.shape[0],
            1,
            1,
            u.shape[1],
            dtype=torch.bool,
        )
        mask = torch.cat([cached, block], -1).expand(
            -1,
            -1,
            u.shape[1],
            -1,
        )
        return self._attend(
            q, torch.cat([keys.to(k.dtype), k], 2), torch.cat([values.to(v.dtype), v], 2), mask
        )

    def _heads(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = self.config.head_dim
        return tuple(
            p(u).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))
