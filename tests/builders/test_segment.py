"""A tower cut into segments computes what the whole tower computes: every cut, run one after another by ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from twotower.builders.segment import fix_axes, layer_bytes, segment
from twotower.bundle import Bundle
from twotower.checkpoint.synthetic import published_slice
from twotower.config.model import parse_model_config
from twotower.export import ExportConfig, export_programs
from twotower.spec import CONDITIONING, CONTEXT, DENOISER, RESIDUAL_IN, RESIDUAL_OUT, TensorSpec
from twotower.weights.external import load_graph

ROOT = Path(__file__).parents[2]
SIZES = {"B": 2, "L": 16, "S": 16, "T": 64}


@pytest.fixture(scope="module", params=["hybrid-a", "hybrid-b"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("segments") / "bundle"
    command = [
        sys.executable,
        "-m",
        "twotower.cli",
        "export",
        str(ROOT / "tests" / "fixtures" / request.param),
        "-o",
        str(path),
        "--no-verify",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return Bundle.open(path)


def feed(specs: tuple[TensorSpec, ...], vocabulary: int) -> dict[str, Any]:
    """Random inputs whose lengths make sense."""
    rng = np.random.default_rng(5)
    out: dict[str, Any] = {}
    for spec in specs:
        shape = spec.shape(SIZES)
        if spec.dtype == "int64":
            most = {
                "chunk_length": 17,
                "past_length": 30,
                "context_length": 40,
                "commit_floor": 3,
            }.get(spec.name, vocabulary)
            out[spec.name] = rng.integers(1, most, shape)
        else:
            out[spec.name] = rng.normal(size=shape).astype(np.float32) * (
                0.3 if spec.name.startswith("past") else 1
            )
    if "block" in out:
        out["block"][:, ::2] = 3  # the mask token
    return out


def run(model: Any, folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(
        zip(
            names,
            session.run(names, {i.name: inputs[i.name] for i in session.get_inputs()}),
            strict=True,
        )
    )


@pytest.mark.parametrize("graph", [CONTEXT, DENOISER])
@pytest.mark.parametrize("length", [1, 2])
def test_segments_one_after_another_are_the_tower(bundle: Bundle, graph: str, length: int) -> None:
    file, sizes = bundle.graph_file(graph), {"T": SIZES["T"], "S": SIZES["S"]}
    model = load_graph(file)
    fix_axes(model, sizes)
    signature = bundle.signatures[graph].with_sizes(sizes)
    inputs = feed(signature.inputs, bundle.config.vocab_size)
    whole = run(model, file.parent, inputs)

    count = len(bundle.config.layers)
    results: dict[str, Any] = {}
    for first in range(0, count, length):
        part = segment(model, signature, (first, min(first + length, count)), dtype="float32")
        made = run(part.model, file.parent, inputs)
        assert [o.name for o in part.outputs] == list(made)
        results.update({k: v for k, v in made.items() if k not in (RESIDUAL_OUT, CONDITIONING)})
        inputs |= {k: v for k, v in made.items() if k == CONDITIONING}
        if RESIDUAL_OUT in made:
            inputs[RESIDUAL_IN] = made[RESIDUAL_OUT]
    assert results.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Layers of published widths, whose query heads are many for a head of keys; graphs alone."""
    config = parse_model_config(published_slice("ME*ME*"), "a published slice")
    folder = tmp_path_factory.mktemp("published")
    return export_programs(config, folder / "bundle", ExportConfig(dtype="bfloat16"), name="slice")


@pytest.mark.parametrize("graph", [CONTEXT, DENOISER])
def test_no_segment_computes_layers_before_it(published: Bundle, graph: str) -> None:
    each_in_one_segment(published, graph)


@pytest.mark.parametrize("graph", [CONTEXT, DENOISER])
def test_every_weight_is_in_exactly_one_segment(bundle: Bundle, graph: str) -> None:
    each_in_one_segment(bundle, graph)


def each_in_one_segment(bundle: Bundle, graph: str) -> None:
    model = load_graph(bundle.graph_file(graph))
    sizes, count = layer_bytes(model), len(bundle.config.layers)
    assert len(sizes.layers) == count
    names = [
        {
            t.name
            for t in segment(
                model, bundle.signatures[graph], (i, i + 1), dtype="float32"
            ).model.graph.initializer
            if t.external_data
        }
        for i in range(count)
    ]
    everything = {t.name for t in model.graph.initializer if t.external_data}
    assert set().union(*names) == everything
    assert sum(map(len, names)) == len(everything)
