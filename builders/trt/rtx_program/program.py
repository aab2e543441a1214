"""What is known of a compiled program: kernels, tensors, memory, copies in device memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_BITS = (
    {"float": 32, "int32": 32, "int64": 64, "half": 16, "bf16": 16, "fp4_e2m1": 4, "int4": 4}
    | {"fp8_e4m3": 8, "int8": 8, "uint8": 8, "bool": 8}
)  # fmt: skip
"""Bits of one element by the compiler's name of its type."""


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of memory.

    Attributes:
        nbytes: At the greatest shapes of the profile; of constants not in bytes.
        place: `accelerator` or `host`.
        constant: Whether it holds constants, which are part of the engine and no scratch.
    """

    name: str
    nbytes: int
    place: str
    constant: bool


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a program.

    Attributes:
        name: The compiler's name; an input's is the graph's, without the mark of its profile.
        dtype: The compiler's name of its element type, for instance `bf16`.
        dims: Sizes at the greatest shapes of the profile; None where the text does not tell.
        region: Empty for what is bound from outside.
        fixed: Whether no size depends on the shapes of a call.
    """

    name: str
    dtype: str
    dims: tuple[int | None, ...]
    region: str
    fixed: bool

    @property
    def nbytes(self) -> int | None:
        """Bytes at the greatest shapes; None where a size or the type is unknown."""
        bits = _BITS.get(self.dtype)
        sizes = [d for d in self.dims if d is not None]
        if bits is None or len(sizes) != len(self.dims):
            return None
        return -(-math.prod(sizes) * bits // 8)

    @property
    def matrix_dims(self) -> tuple[int, ...]:
        """The sizes above 1: two for a matrix, three for a stack of matrices."""
        return tuple(d for d in self.dims if d is not None and d > 1)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One statement that launches work: a kernel, or a product the library may split in two.

    Attributes:
        operation: `function` (generated), `fully_connected` (product of the kernel library),
            `runtime_fusion` (product with what was fused into it) and others.
        name: The compiler's, which tells its steps: `__myl_CastMulCast`.
        scope: The layer or part it counts for, for instance `layers.3.moe` or `sampler`.
        backbone: Of a runtime fusion, what it is built around, for instance `gemm`.
    """

    operation: str
    name: str
    stream: int
    nodes: tuple[str, ...]
    scope: str
    backbone: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices, and may read a weight in any form."""
        return self.operation == "fully_connected" or self.backbone == "gemm"


@dataclass(frozen=True, slots=True)
class ExpandedWeight:
    """A copy of weights that a pass writes to device memory before the product reads it.

    Attributes:
        weights: Names and element types of what it reads, as `int8 [8, 128, 96]` where the
            compiler renamed a constant.
        nbytes: Bytes written in every pass.
    """

    kernel: str
    scope: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    dims: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices: the routed experts of a layer."""
        return len([d for d in self.dims if d > 1]) == 3


@dataclass(frozen=True, slots=True)
class CopiedCache:
    """Keys or values of all positions, copied in every pass before attention reads them.

    Attributes:
        nbytes: Bytes written at the greatest shapes.
        times: How often it writes each of them: 1 where it transposes them, and more where every
            query head of a group gets its own.
    """

    kernel: str
    scope: str
    cache: str
    nbytes: int
    times: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What one pass with one optimization profile runs; all compute capabilities share it.

    Attributes:
        sms: Compute capabilities it was compiled for; of the portable default set it names 80.
        capturable: Whether the library allows capture into a CUDA graph; None where not told.
    """

    profile: int
    sms: tuple[int, ...]
    kernels: tuple[Kernel, ...]
    streams: int
    events: int
    signals: int
    waits: int
    capturable: bool | None
    regions: tuple[Region, ...]
    tensors: Mapping[str, Tensor]
    expanded: tuple[ExpandedWeight, ...]
    copied: tuple[CopiedCache, ...]

    @property
    def scratch(self) -> int:
        """Bytes of device memory for activations, at the greatest shapes of the profile."""
        return sum(r.nbytes for r in self.regions if r.place == "accelerator" and not r.constant)

    @property
    def host(self) -> int:
        """Bytes of host memory for sizes and control, constants left out."""
        return sum(r.nbytes for r in self.regions if r.place == "host" and not r.constant)

    def by_scope(self) -> dict[str, int]:
        """Kernels of every layer and part, in order of first use."""
        return dict(Counter(kernel.scope for kernel in self.kernels))
