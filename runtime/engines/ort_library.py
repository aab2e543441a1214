"""What is needed of ONNX Runtime on a GPU: the library is a value, and may be a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from twotower.runtime.memory import numpy_dtype

__all__ = ["OrtLibrary", "element_type"]

_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16


class OrtLibrary(Protocol):
    """The library.

    Attributes:
        version: Its version; engines are tied to it.
        device_type: The kind of memory its bindings are told, `cuda`.
    """

    version: str
    device_type: str

    def session(self, graph: Path, folder: Path, *, device: int, stream: int) -> Any:
        """A session of a graph on a device and a CUDA stream; weights are named from `folder`."""
        ...

    def run_options(self) -> Any:
        """Options of a pass that does not wait for its own end."""
        ...


def element_type(dtype: str) -> Any:
    """What a binding wants to know; NumPy has no bfloat16, so that is given by its ONNX number."""
    return _ONNX_BFLOAT16 if dtype == "bfloat16" else numpy_dtype(dtype).type
