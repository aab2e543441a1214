"""Element types: their names here, in other formats, and in NumPy.

NumPy and ml_dtypes are imported on demand: `twotower VERB --help` reads this table too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        bits: Of one element; elements of 4 bits lie two to a byte, the first in the low half.
        numpy: Its name in NumPy or ml_dtypes. int4 has none: elements are unpacked to int8.
        carried: The NumPy type of its raw bits, where an array is passed on and nothing computed.
        onnx: Its number in ONNX's `TensorProto.DataType`; 0 where ONNX has none that we use.
        safetensors: Its name in a checkpoint's headers, of types we read.
        tensorrt: Its name in `tensorrt.DataType`, of types an engine's inputs and outputs have.
    """

    bits: int
    numpy: str
    carried: str
    onnx: int = 0
    safetensors: str = ""
    tensorrt: str = ""


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "float32": DType(32, "float32", "float32", 1, "F32", "FLOAT"),
        "float16": DType(16, "float16", "float16", 10, "F16", "HALF"),
        "bfloat16": DType(16, "bfloat16", "uint16", 16, "BF16", "BF16"),
        "int64": DType(64, "int64", "int64", 7, "", "INT64"),
        "int32": DType(32, "int32", "int32", 6),
        "bool": DType(8, "bool", "bool", 9),
        "int8": DType(8, "int8", "int8", 3, "", "INT8"),
        "uint8": DType(8, "uint8", "uint8", 2),
        "int4": DType(4, "int8", "uint8", 22),
        "uint4": DType(4, "uint8", "uint8", 21),
        "float8e4m3fn": DType(8, "float8_e4m3fn", "uint8", 17, "", "FP8"),
        "float8e8m0": DType(8, "float8_e8m0fnu", "uint8", 24),
        "float4e2m1": DType(4, "float4_e2m1fn", "uint8", 23),
    }
)
"""Every type by its name here."""

FLOATS = ("bfloat16", "float16", "float32")
"""Types that a checkpoint's weights and a graph's arithmetic can have."""

_OF_ONNX = {dtype.onnx: name for name, dtype in DTYPES.items()}


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type that elements are computed in; 4-bit types take a byte an element there."""
    import ml_dtypes
    import numpy as np

    known = DTYPES[name].numpy
    out: np.dtype[Any] = np.dtype(getattr(ml_dtypes, known, known))
    return out


@cache
def carried_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type an array is passed on in: raw bits where NumPy itself has no such type."""
    import numpy as np

    out: np.dtype[Any] = np.dtype(DTYPES[name].carried)
    return out


def onnx_code(name: str) -> int:
    """The type's number in ONNX."""
    return DTYPES[name].onnx


def dtype_of_onnx(code: int) -> str | None:
    """The name of an ONNX type; None for one we do not use."""
    return _OF_ONNX.get(code)


def stored_bytes(name: str, count: int) -> int:
    """Bytes of `count` elements, one after another."""
    return -(-count * DTYPES[name].bits // 8)


def item_bytes(name: str) -> int:
    """Bytes of one element of a type of whole bytes."""
    return DTYPES[name].bits // 8


def to_float32(raw: npt.NDArray[Any], name: str) -> npt.NDArray[np.float32]:
    """Raw elements of a type of whole bytes as float32, exactly; float32 itself without a copy."""
    return raw.view(numpy_dtype(name)).astype(numpy_dtype("float32"), copy=False)


def to_stored(values: npt.NDArray[np.float32], name: str) -> npt.NDArray[Any]:
    """Float32 numbers rounded to a type, to nearest and ties to even, as its raw elements.

    A number that is too large becomes infinite.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(numpy_dtype(name), copy=False).view(carried_dtype(name))
