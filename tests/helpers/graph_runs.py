"""Graphs of a bundle in ONNX Runtime, with random inputs whose lengths fit one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from twotower.spec import TensorSpec

__all__ = ["SIZES", "random_inputs", "run_graph"]

SIZES = {"B": 2, "L": 16, "S": 16, "T": 64}
_LENGTHS = {"chunk_length": 17, "past_length": 30, "context_length": 40, "commit_floor": 3}


def random_inputs(specs: Sequence[TensorSpec], vocabulary: int) -> dict[str, Any]:
    """Values of a graph's inputs; of a block every second position is still to be predicted."""
    rng = np.random.default_rng(5)
    out: dict[str, Any] = {}
    for spec in specs:
        shape = spec.shape(SIZES)
        if spec.dtype == "int64":
            out[spec.name] = rng.integers(1, _LENGTHS.get(spec.name, vocabulary), shape)
        else:
            out[spec.name] = rng.normal(size=shape).astype(np.float32) * 0.3
    if "block" in out:
        out["block"][:, ::2] = 3  # the mask token
    return out


def run_graph(
    model: Any,
    folder: Path,
    inputs: dict[str, Any],
    *,
    level: Any = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    packed: bool = True,
) -> dict[str, Any]:
    """Outputs by name; weights lie in `folder`, and inputs the graph lacks are left out."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    for key, value in (
        ("session.disable_prepacking", str(int(not packed))),
        ("session.model_external_initializers_file_folder_path", str(folder)),
    ):
        options.add_session_config_entry(key, value)
    content = model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    given = {i.name: inputs[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))
