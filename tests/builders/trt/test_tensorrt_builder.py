"""What TensorRT would refuse or compute wrongly never reaches it: the builder looks at the very graphs it is to be given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.errors import fails
from twotower.builders import BuildConfig
from twotower.builders.trt import make_engine
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.bundle import Bundle
from twotower.errors import BuildError
from twotower.tensorrt_library import Variant

CONFIG = BuildConfig(max_context=256, experts="dense")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """The graphs that reach the library, which is not there."""
    graphs: list[onnx.ModelProto] = []

    def run(job: dict[str, Any], scratch: Path, *, tick: Any) -> dict[str, Any]:
        graphs.append(onnx.load(job["graph"], load_external_data=False))
        Path(job["output"]).write_bytes(b"engine")
        return {"layers": 0}

    monkeypatch.setattr(make_engine, "run_job", run)
    return graphs


def build(bundle: Bundle, folder: Path) -> Any:
    module = SimpleNamespace(__name__="tensorrt_rtx")
    variant = Variant(module, "rtx", "0", (86, 89, 120), runtime_cache=True, capturable=True)
    folder.mkdir()
    return TensorRTBuilder(variant).plan(bundle, CONFIG).build(folder, report=lambda *_: None)


def test_notes_are_in_the_report_of_their_engine(
    tmp_path: Path, given: list[onnx.ModelProto]
) -> None:
    record = build(export_fixture("hybrid-b", tmp_path / "b", "float32"), tmp_path / "engines")
    engines = record.report["engines"]
    notes = {file: [n["rule"] for n in engine["notes"]] for file, engine in engines.items()}
    none = {"context_head.engine": [], "denoiser.engine": []}
    assert notes == {"context.engine": ["attention-float32"], **none}
    assert len(given) == 3


def causal(model: onnx.ModelProto) -> None:
    """A mask in the wrong corner, in the first attention layer."""
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    node.attribute.append(onnx.helper.make_attribute("is_causal", 1))


def summed(model: onnx.ModelProto) -> None:
    """A sum that is miscompiled, in the last graph that is built."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(1), "axis"))
    node = next(n for n in model.graph.node if n.op_type == "Sigmoid")
    node.op_type = "CumSum"
    node.input.append("axis")


@pytest.mark.parametrize(
    ("graph", "harm", "rule"),
    [("context", causal, "attention-causal"), ("denoiser", summed, "refused-operators")],
)
def test_a_bundle_that_breaks_a_rule_is_refused_before_anything_is_built(
    graph: str,
    harm: Callable[[onnx.ModelProto], None],
    rule: str,
    tmp_path: Path,
    given: list[onnx.ModelProto],
) -> None:
    bundle = export_fixture("hybrid-b", tmp_path / "b", "bfloat16")
    file = bundle.graph_file(graph)
    model = onnx.load(str(file), load_external_data=False)
    harm(model)
    file.write_bytes(model.SerializeToString())
    with fails(BuildError, what=f"{graph}.engine", found=rule):
        build(bundle, tmp_path / "engines")
    assert not given
