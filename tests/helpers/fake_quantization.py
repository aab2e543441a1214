"""Fake quantization in torch, written independently, and towers that compute with it.

Nothing here is taken from `twotower.calibration`: types are torch's own where it has them, a table
of values where it has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from twotower.config import read_model_config
from twotower.model import ContextTower, DenoiserTower
from twotower.model.loading import load_context_tower, load_denoiser_tower

FLOAT4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_float4(x: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties to an even last bit."""
    magnitude = x.abs().clamp(max=6.0)
    distance = (magnitude[..., None] - FLOAT4).abs()
    nearest = distance.min(-1).values
    candidates = distance == nearest[..., None]
    even = candidates & (torch.arange(8) % 2 == 0)
    index = torch.where(even.any(-1), even.int().argmax(-1), candidates.int().argmax(-1))
    return FLOAT4[index] * x.sign()


def fake_quantize(
    w: torch.Tensor, name: str, *, group: int = 0, greatest: float | None = None
) -> torch.Tensor:
    """A matrix [out, in] float32, quantized and read back; `greatest` is the stack's, for nvfp4."""
    rows = w.reshape(w.shape[0], -1, group or w.shape[-1])
    if name == "nvfp4":
        shared = torch.tensor((greatest or float(w.abs().max())) / (6 * 448), dtype=torch.float32)
        scale = (rows.abs().amax(-1, keepdim=True) / 6 / shared).clamp(2.0**-9, 448).to(
            torch.float8_e4m3fn
        ).float() * shared
        return (to_float4(rows / scale) * scale).reshape(w.shape)
    largest = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[name]
    scale = (rows.abs().amax(-1, keepdim=True) / largest).clamp(min=2.0**-24)
    units = (rows / scale).clamp(-largest, largest)
    units = units.to(torch.float8_e4m3fn).float() if name == "fp8" else units.round()
    return (units * scale).reshape(w.shape)


def fake_input(x: torch.Tensor, dtype: str, scale: float) -> torch.Tensor:
    """The input of a product, rounded with a scale for all of it; ONNX's int8 reaches to -128."""
    units = x / torch.tensor(scale, dtype=torch.float32)
    units = (
        units.round().clamp(-128, 127)
        if dtype == "int8"
        else units.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    )
    return units * torch.tensor(scale, dtype=torch.float32)


def block_of(columns: int, group: int, *, even_rows: bool) -> int:
    """Values of an input that ONNX Runtime on a CPU quantizes together, in a quantized product.

    The widest that divides a row and the weights that share a scale, where the product always has
    an even number of rows.
    """
    widest = 128 if even_rows else 32
    return max(
        block
        for block in (32, 64, 128)
        if block <= widest and columns % block == 0 == (group or columns) % block
    )


def in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """The input of a product, each `block` values in 8 bits with a scale of their own."""
    grouped = x.reshape(*x.shape[:-1], -1, block)
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    units = (grouped * torch.where(scale > 0, 1 / scale, 0)).round().clamp(-128, 127)
    return (units * scale).reshape(x.shape)


class _InProjection(nn.Module):
    """Mamba's first product: exact rows for dt, the others quantized, weights and input."""

    def __init__(
        self,
        exact: torch.Tensor,
        few: torch.Tensor,
        heads: int,
        rounded: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.exact, self.few, self.heads, self.rounded = exact, few, heads, rounded

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            (self.rounded(u) @ self.few[: -self.heads].T, u @ self.exact[-self.heads :].T), -1
        )


@cache
def weights_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def quantized_towers(
    folder: Path,
    formats: Mapping[str, tuple[str, int]],
    activations: Mapping[str, tuple[str, float]],
    *,
    blocks: bool = False,
) -> tuple[ContextTower, DenoiserTower]:
    """The towers of a checkpoint.

    Args:
        folder: The checkpoint.
        formats: By stacked weight name the format and its group.
        activations: By the name of the first weight an input is multiplied with its type and scale.
        blocks: Whether products of integers round their inputs in blocks, as ONNX Runtime on a CPU
            does.
    """
    config, tensors = read_model_config(folder / "config.json"), weights_of(folder)

    def read(name: str) -> torch.Tensor:
        exact = torch.from_numpy(tensors[name])
        stack = stack_of(name)
        if stack not in formats or name.endswith("in_proj.weight"):
            return exact
        how, group = formats[stack]
        greatest = max(float(np.abs(tensors[n]).max()) for n in tensors if stack_of(n) == stack)
        return fake_quantize(exact, how, group=group, greatest=greatest)

    towers = load_context_tower(config, read), load_denoiser_tower(config, read)
    for tower, prefix in zip(towers, ("context_tower", "denoiser_tower"), strict=True):
        for name, module in list(tower.named_modules()):
            weight = stack_of(_HEADS.get(f"{prefix}.{name}", f"{prefix}.{name}") + ".weight")
            even = prefix == "denoiser_tower" or ".experts." in weight

            def rounding(weight: str, columns: int, even: bool = even) -> _Rounding:
                how, group = formats.get(weight, ("", 0))
                in_blocks = blocks and how in ("int4", "int8")
                block = block_of(columns, group, even_rows=even) if in_blocks else 0
                return _Rounding(activations.get(weight), block)

            if isinstance(module, nn.Linear) and not weight.endswith("in_proj.weight"):
                _rounds_input(module, rounding(weight, module.in_features))
            split = f"{prefix}.{name}.in_proj.weight"
            if name.endswith("mixer") and split in formats:
                how, group = formats[split]
                exact = module.in_proj.weight.detach()
                few, rounded = (
                    fake_quantize(exact, how, group=group),
                    rounding(split, exact.shape[1]),
                )
                module.in_proj = _InProjection(exact, few, config.mamba_num_heads, rounded)
    return towers


_HEADS = {"context_tower.lm_head": "context_lm_head", "denoiser_tower.lm_head": "lm_head"}


@dataclass(frozen=True)
class _Rounding:
    """How a product's input is quantized: with one scale, in blocks, both, or not at all."""

    whole: tuple[str, float] | None
    block: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = fake_input(x, *self.whole) if self.whole else x
        return in_blocks(x, self.block) if self.block else x


def _rounds_input(module: nn.Module, rounding: _Rounding) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]),))


def stack_of(name: str) -> str:
    """The graph's weight a tensor goes into.

    `...experts.3.up_proj.weight` lies in `...experts.up_proj.weight`, q, k and v in `qkv_proj`.
    """
    words = name.split(".")
    words = ["qkv_proj" if w in ("q_proj", "k_proj", "v_proj") else w for w in words]
    return ".".join(
        w for i, w in enumerate(words) if not (w.isdigit() and words[i - 1] == "experts")
    )
