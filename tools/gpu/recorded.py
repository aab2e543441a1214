"""Passes of the small models for the section `rtx`: a graph, its inputs, and what comes out of it.

The graph with one product is computed with NumPy, the towers' passes by the torch engine while it
writes a recorded text over the tests' fake for CUDA. Neither knows TensorRT.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.fake_cuda import FakeCuda
from tools.gpu.counted import CountedCuda
from tools.gpu.cuda_layer import Case, tokens_of_case, torch_bundle
from tools.gpu.torch_engine import Arrays, TorchTensorRT

__all__ = ["Pass", "product_pass", "recorded_passes", "write_pass"]

CASE = Case("hybrid-a")
_OPSET = 21


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of a graph."""

    graph: bytes
    given: Arrays
    wanted: Arrays


def recorded_passes() -> dict[str, Pass]:
    """`product`, `denoiser` and `context`, each a pass in float32."""
    passes: dict[str, Pass] = {"product": product_pass()}

    def record(graph: bytes, given: Arrays, wanted: Arrays) -> None:
        if "block" in given:
            passes.setdefault("denoiser", Pass(graph, given, wanted))
        elif "chunk_length" in given:  # the last one starts from a state that is not empty
            passes["context"] = Pass(graph, given, wanted)

    api = FakeCuda()
    trt = TorchTensorRT("cpu", api)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = torch_bundle(CASE, Path(scratch) / "bundle")
        trt.record = record
        facts = tokens_of_case(bundle, CASE, trt, cuda=CountedCuda(api), graphs=False, most=1)
    if not facts["right"]:
        raise RuntimeError(
            f"the torch engine does not write the recorded text: {json.dumps(facts)}"
        )
    return passes


def write_pass(folder: Path, name: str, one: Pass) -> None:
    """Writes `<name>.onnx` and `<name>.npz`, with `in.` and `out.` before the names of tensors."""
    (folder / f"{name}.onnx").write_bytes(one.graph)
    given = {f"in.{key}": array for key, array in one.given.items()}
    np.savez_compressed(
        folder / f"{name}.npz",
        **given,
        **{f"out.{key}": array for key, array in one.wanted.items()},
    )


def product_pass() -> Pass:
    """A product and a ReLU: the smallest graph that says something."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((64, 64), np.float32), rng.standard_normal((4, 64), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Relu", ["product"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 64])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    onnx.checker.check_model(model)
    return Pass(model.SerializeToString(), {"x": x}, {"y": np.maximum(x @ w, 0)})
