"""Low-bit number formats as data: what a weight is stored as, and how many share a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from twotower.dtypes import DTYPES, stored_bytes

ACTIVATIONS: Mapping[str, float] = MappingProxyType({"int8": 127.0, "float8e4m3fn": 448.0})
"""Types the input of a product can be quantized to, and the largest value each is used for."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a quantized matrix [..., out, in] is stored.

    Attributes:
        name: `int8`, `fp8`, `int4` or `nvfp4`.
        dtype: Element type of the values.
        largest: Largest magnitude a value is used for, where the greatest weight of a group lands.
        group: Neighbours along the last axis that share a scale; 0 for a whole row.
        scale_dtype: Element type of the scales; None for the graph's own. With `float8e4m3fn` a
            second, global scale per tensor in the graph's type multiplies them.
        first_sm: The first compute capability whose hardware has the type.
    """

    name: str
    dtype: str
    largest: float
    group: int = 0
    scale_dtype: str | None = None
    first_sm: int = 75

    @property
    def bits(self) -> int:
        """Of one value, its share of the scale not counted."""
        return DTYPES[self.dtype].bits

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        if not self.group:
            return 1
        return -(-columns // self.group)

    def nbytes(
        self,
        shape: tuple[int, ...],
        dtype: str,
    ) -> int:
        """Bytes of a matrix with its scales, in a graph of element type `dtype`."""
        rows, scales = math.prod(shape[:-1]), self.groups(shape[-1])
        return stored_bytes(self.dtype, rows * shape[-1]) + stored_bytes(
            self.scale_dtype or dtype, rows * scales
        )

    @property
    def label(self) -> str:
        """As a person reads it: `int4 in groups of 32`."""
        if self.group:
            return f"{self.name} in groups of {self.group}"
        return self.name


FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        "int8": WeightFormat("int8", "int8", 127.0),
        "fp8": WeightFormat("fp8", "float8e4m3fn", 448.0, first_sm=89),
        "int4": WeightFormat("int4", "int4", 7.0, group=32, first_sm=80),
        "nvfp4": WeightFormat(
            "nvfp4", "float4e2m1", 6.0, group=16, scale_dtype="float8e4m3fn", first_sm=120
        ),
    }
)
"""Formats the graphs can hold: those ONNX opset 24 and TensorRT have (docs/quantization.md)."""


GROUPS = (128, 64, 32)
"""Weights of int4 that may share a scale within a row: what the kernels of experts tile."""


_LONG_ROW, _INT8_GROUPS = 128, (64, 32)


def stored_format(
    name: str,
    columns: int,
    *,
    stacked: bool,
    rounded_input: bool = False,
    group: int = 32,
) -> WeightFormat:
    """The format as a matrix with rows of `columns` takes it; `group` is of int4.

    In 8-bit integers a row has one scale, except stacked experts with long rows: their scales are
    blocks in any case, and groups of 64 make the error a third smaller. Not where the product's
    input is quantized too: TensorRT for RTX 1.7 builds no such product of blocks.
    """
    if name == "int4":
        return replace(FORMATS[name], group=group)
    if name == "int8" and stacked and not rounded_input and columns > _LONG_ROW:
        return replace(FORMATS[name], group=next((g for g in _INT8_GROUPS if columns % g == 0), 0))
    return FORMATS[name]


NARROW_BLOCK = 32
"""Weights of a block in which ONNX Runtime on a CPU computes a row alike, whatever their number."""

_BLOCKS = (128, 64, NARROW_BLOCK)


def product_block(
    columns: int,
    group: int,
    *,
    even_rows: bool,
) -> int:
    """Weights that share a scale in a product of ONNX Runtime on a CPU, 0 if it cannot read them.

    `group` is the same as stored, a row's length for one scale a row. `even_rows`: the product
    always has an even number of rows (`builders/ort/quantized_products.py`).
    """
    blocks = _BLOCKS if even_rows else (NARROW_BLOCK,)
    return next((block for block in blocks if columns % block == 0 and group % block == 0), 0)


FUSED_STACKS = "int4 (recipes mixed, int4-experts), or 8 bits with 8-bit inputs (recipes int8, fp8)"
"""Stacked experts that TensorRT for RTX multiplies as they are stored, as it is said to a user."""


def stack_is_expanded(
    target: str,
    name: str,
    *,
    rounded_input: bool,
) -> bool:
    """Whether a pass dequantizes stacked experts to device memory before it multiplies them.

    TensorRT for RTX 1.7 dequantizes inside the product only where it has a kernel for that: 4-bit
    integers, and 8 bits on both sides. Tests hold this against the programs it compiles. TensorRT
    shares its compiler and is taken to do the same. ONNX Runtime has no product of stacked low-bit
    weights: it dequantizes all of them with a kernel of its own.
    """
    fused = name == "int4" or (rounded_input and FORMATS[name].dtype in ACTIVATIONS)
    return not (fused and target in ("rtx", "trt"))
