"""The Mamba-2 mixer: a chunk at once, from convolution and SSM state, scanned in float32."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from twotower.config import ModelConfig


class Scale(nn.Module):
    """The weight of a norm that is computed elsewhere."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class Mamba2(nn.Module):
    """Parameters as published; `A_log`, `D` and `dt_bias` [H] are used in float32."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.in_proj = nn.Linear(
            c.hidden_size, c.mamba_inner + c.conv_channels + c.mamba_num_heads, bias=False
        )
        self.conv1d = nn.Conv1d(
            c.conv_channels,
            c.conv_channels,
            c.conv_kernel,
            groups=c.conv_channels,
            bias=c.use_conv_bias,
        )
        self.dt_bias = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.A_log = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.D = nn.Parameter(torch.empty(c.mamba_num_heads))
        self.norm = Scale(c.mamba_inner)
        self.out_proj = nn.Linear(c.mamba_inner, c.hidden_size, bias=False)

    def forward(
        self,
        u: torch.Tensor,
        conv: torch.Tensor,
        ssm: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs a chunk u [B,L,D]: [B,L,D] and both states after each row's last valid token.

        `conv` [B,K-1,C] are the last raw inputs of the convolution, `ssm` is [B,H,P,N] float32.
        What comes after the `lengths` [B] valid tokens (None for all) leaves no trace in the
        states.
        """
        c = self.config
        z, raw, dt = self.in_proj(u).split([c.mamba_inner, c.conv_channels, c.mamba_num_heads], -1)
        rows = torch.cat([conv.to(raw.dtype), raw], 1)
        mixed = F.silu(self.conv1d(rows.transpose(1, 2))).transpose(1, 2).float()
        dt = F.softplus(dt.float() + self.dt_bias.float())
        low, high = c.time_step_limit
        if low > 0 or high < math.inf:
            dt = dt.clamp(low, high)
        count = torch.full((u.shape[0],), u.shape[1]) if lengths is None else lengths
        dt = dt * (torch.arange(u.shape[1]) < count[:, None])[..., None]
        y, after = self._scan(mixed, dt, ssm)
        kept = (count[:, None] + torch.arange(c.conv_kernel - 1))[..., None]
        out = self.out_proj(self._gated_norm(y, z).to(u.dtype))
        return out, rows.gather(1, kept.expand(-1, -1, c.conv_channels)), after

    def _scan(
        self,
        mixed: torch.Tensor,
        dt: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Y [B,L,HP] and the new state, from x, B and C side by side [B,L,C] and dt [B,L,H]."""
        c = self.config
        states = c.n_groups * c.ssm_state_size
        x, b, cc = mixed.split([c.mamba_inner, states, states], -1)
        x = x.unflatten(-1, (c.mamba_num_heads, -1)).transpose(1, 2)  # [B,H,L,P]
        share = c.mamba_num_heads // c.n_groups
        b, cc = (
            t.unflatten(-1, (c.n_groups, -1)).transpose(1, 2).repeat_interleave(share, 1)
            for t in (b, cc)
        )  # [B,H,L,N]
        dt = dt.transpose(1, 2)
        decay = (dt * -torch.exp(self.A_log.float())[:, None]).cumsum(-1)
        causal = torch.ones(
            x.shape[2],
            x.shape[2],
            dtype=torch.bool,
        ).tril()
        exponent = decay[..., :, None] - decay[..., None, :]
        within = torch.exp(exponent.masked_fill(~causal, -math.inf))
        x_dt = x * dt[..., None]
        y = ((cc @ b.transpose(-1, -2)) * within) @ x_dt
        carried = (cc @ state.transpose(-1, -2)) * torch.exp(decay)[..., None]
        y = y + carried + x * self.D.float()[:, None, None]
        to_end = torch.exp(decay[..., -1:] - decay)[..., None]
        kept = state * torch.exp(decay[..., -1])[..., None, None]
        after = kept + (x_dt * to_end).transpose(-1, -2) @ b
        return y.transpose(1, 2).flatten(-2), after

    def _gated_norm(
        self,
        y: torch.Tensor,
        z: torch.Tensor,
    ) -> torch.Tensor:
        """RMSNorm of y * silu(z) within each group of channels, float32."""
        gated = (y * F.silu(z.float())).unflatten(-1, (self.config.n_groups, -1))
        squares = gated.square().mean(-1, keepdim=True)
        normed = gated * torch.rsqrt(squares + self.config.layer_norm_epsilon)
        return normed.flatten(-2) * self.norm.weight.float()
