"""What is needed of ONNX Runtime on a GPU: the library is a value, and may be a fake."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from twotower.dtypes import carried_dtype, onnx_code

__all__ = ["OrtLibrary", "element_type"]


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
    return onnx_code(dtype) if dtype == "bfloat16" else carried_dtype(dtype).type
