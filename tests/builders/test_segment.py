"""A tower cut into segments computes what the whole tower computes: every cut, run one after another by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.graph_runs import SIZES, random_inputs, run_graph
from twotower.builders.segment import fix_axes, layer_bytes, segment
from twotower.bundle import Bundle
from twotower.checkpoint.synthetic import published_slice
from twotower.config.model import parse_model_config
from twotower.export import ExportConfig, export_programs
from twotower.spec import CONDITIONING, CONTEXT, DENOISER, RESIDUAL_IN, RESIDUAL_OUT
from twotower.weights.external import load_graph, weight_refs


@pytest.mark.parametrize("graph", [CONTEXT, DENOISER])
@pytest.mark.parametrize("length", [1, 2])
def test_segments_one_after_another_are_the_tower(hybrid: Bundle, graph: str, length: int) -> None:
    file, sizes = hybrid.graph_file(graph), {"T": SIZES["T"], "S": SIZES["S"]}
    model = load_graph(file)
    fix_axes(model, sizes)
    signature = hybrid.signatures[graph].with_sizes(sizes)
    inputs = random_inputs(signature.inputs, hybrid.config.vocab_size)
    whole = run_graph(model, file.parent, inputs)

    count = len(hybrid.config.layers)
    results: dict[str, Any] = {}
    for first in range(0, count, length):
        part = segment(model, signature, (first, min(first + length, count)), dtype="float32")
        made = run_graph(part.model, file.parent, inputs)
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
def test_every_weight_is_in_exactly_one_segment(
    hybrid: Bundle, published: Bundle, graph: str
) -> None:
    """So none computes layers before it."""
    for bundle in (hybrid, published):
        model, signature = load_graph(bundle.graph_file(graph)), bundle.signatures[graph]
        count = len(bundle.config.layers)
        assert len(layer_bytes(model).layers) == count
        parts = [segment(model, signature, (i, i + 1), dtype="float32").model for i in range(count)]
        names = [set(weight_refs(part)) for part in parts]
        everything = set(weight_refs(model))
        assert set().union(*names) == everything
        assert sum(map(len, names)) == len(everything)
