"""Which experts the fused operators of ONNX Runtime compute on a GPU (see `fused_experts`)."""

from __future__ import annotations

from dataclasses import replace

from twotower.bundle import ExpertsStep
from twotower.config.formats import FORMATS
from twotower.errors import BuildError

RELU2_SINCE = (1, 32)
"""The first ONNX Runtime whose CUDA kernels take squared ReLU."""

_GROUPS = (32, 64, 128)
_TILE = 64
_INSTEAD = "build with --experts dense, which computes every expert"


def require_fusable(step: ExpertsStep, version: str) -> None:
    """Refuses, by BuildError, experts that neither CUDA operator of this version computes."""
    if _release(version) < RELU2_SINCE:
        raise BuildError(
            f"ONNX Runtime {version} has no fused experts with squared ReLU",
            found=f"its CUDA kernels take that from {'.'.join(map(str, RELU2_SINCE))} on",
            do=f"install a newer ONNX Runtime here and on the GPU machine, or {_INSTEAD}",
        )
    used = {step.formats.get(matrix) for matrix in ("up", "down")}
    if used == {None}:
        _require_float(step)
    else:
        _require_integers(step, sorted(used, key=str))


def _require_float(step: ExpertsStep) -> None:
    multiple = 4 if step.dtype == "float32" else 8  # 16 bytes
    for what, size in (("hidden_size", step.hidden), ("moe_intermediate_size", step.width)):
        if size % multiple or size < 16:
            raise BuildError(
                "com.microsoft.MoE does not compute experts of this size",
                found=f"{what} {size}; in {step.dtype} multiples of {multiple}, and 16 at least",
                do=_INSTEAD,
            )


def _require_integers(step: ExpertsStep, used: list[tuple[str, int] | None]) -> None:
    named = [replace(FORMATS[how[0]], group=how[1]).label if how else step.dtype for how in used]
    if len(used) > 1 or used[0] is None or used[0][0] not in ("int4", "int8"):
        raise BuildError(
            "com.microsoft.QMoE does not compute experts in this format",
            found=f"{' and '.join(named)}; it takes int4 and int8 with one group for both matrices",
            do=f"quantize with another recipe, or {_INSTEAD}",
        )
    if step.dtype == "float32":
        raise BuildError(
            "com.microsoft.QMoE has no CUDA kernel for float32",
            found=f"experts of {named[0]} in a float32 bundle; float16 and bfloat16 are taken",
            do=f"export with --dtype bfloat16 and quantize that, or {_INSTEAD}",
        )
    group = used[0][1]
    if group and group not in _GROUPS:
        raise BuildError(
            "com.microsoft.QMoE does not take this group",
            found=f"{group} weights a scale; {', '.join(map(str, _GROUPS))}, or a whole row",
            do=f"quantize with another group, or {_INSTEAD}",
        )
    for what, size in (("hidden_size", step.hidden), ("moe_intermediate_size", step.width)):
        if size % max(_TILE, group):
            raise BuildError(
                "com.microsoft.QMoE does not compute experts of this size",
                found=f"{what} {size}; multiples of {max(_TILE, group)}",
                do=_INSTEAD,
            )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in version.split(".")[:2])
