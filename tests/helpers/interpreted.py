"""The kernels in Triton's interpreter: a GPU's launches, over tensors on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from twotower.kernels.cubin_manifest import Manifest
from twotower.kernels.launches import SCRATCH, launches, scratch_bytes
from twotower.kernels.signatures import kernel_specs
from twotower.kernels.twin import Array

__all__ = ["run_interpreted"]

_TYPES = {
    "*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32,
    "*i32": torch.int32, "*i8": torch.int8, "*u8": torch.uint8,
}  # fmt: skip


def run_interpreted(
    manifest: Manifest, x: Array, shares: Array, weights: Mapping[str, Array], sm: int = 80
) -> Array:
    """The result of a layer, by its launches. Memory that nothing was written to is full of NaN."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise AssertionError(
            "run `make kernels`: the interpreter has to be chosen before Triton is imported"
        )
    from twotower.kernels.compile import device_functions

    shape, count = manifest.shape, len(x)
    specs = {spec.name: spec for spec in kernel_specs(shape, sm)}
    scratch = torch.full((scratch_bytes(shape, count),), 0xFF, dtype=torch.uint8)
    out = np.full_like(x, 0x7FC0 if x.dtype == np.uint16 else np.nan)
    arrays = {"x": x, "shares": shares, "out": out, **weights}
    for launch in launches(shape, count, sm, manifest):
        spec = specs[launch.kernel]
        given = [
            _tensor(value, kind, arrays, scratch)
            for value, (_, kind) in zip(launch.params, spec.arguments, strict=True)
        ]
        device_functions()[spec.function][launch.grid](
            *given, **spec.constants, num_warps=spec.warps, num_stages=spec.stages
        )
    return out


def _tensor(value: str | int, kind: str, arrays: Mapping[str, Array], scratch: torch.Tensor) -> Any:
    if kind == "i32":
        return value
    if isinstance(value, int):
        assert value == 0
        return torch.zeros(1, dtype=_TYPES[kind])  # nothing is there to be read
    if value.startswith(SCRATCH):
        rest = scratch[int(value.removeprefix(SCRATCH)) :]
        size = torch.empty(0, dtype=_TYPES[kind]).element_size()
        return rest[: len(rest) // size * size].view(_TYPES[kind])
    array = arrays[value]
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
