"""Declared weights take every tensor of a checkpoint once, whatever is quantized."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest

from twotower.checkpoint.layout import expected_tensors
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.config.formats import FORMATS
from twotower.config.model import parse_model_config
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER
from twotower.weights.declared import QUANTIZABLE, declared_weights

PUBLISHED = parse_model_config(PUBLISHED_CONFIG, "published")
GRAPHS = (CONTEXT, CONTEXT_HEAD, DENOISER)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_is_declared_once_and_whole(dtype: str) -> None:
    known = expected_tensors(PUBLISHED)
    weights = [w for graph in GRAPHS for w in declared_weights(PUBLISHED, graph, dtype)]
    assert Counter(name for w in weights for name in w.sources) == Counter(known.keys())
    for weight in weights:
        sources = [known[name] for name in weight.sources]
        assert math.prod(weight.shape) == sum(math.prod(tensor.shape) for tensor in sources)
        assert {tensor.role for tensor in sources} == {weight.role}
        layers = {
            name.split(".layers.")[1].split(".")[0] for name in weight.sources if ".layers." in name
        }
        assert layers <= {str(weight.layer)}
        assert weight.dtype in ("float32", dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_weight_is_declared_in_parts(name: str) -> None:
    """Its values and scales, and of Mamba's first product the rows of dt as they were."""
    how, heads = FORMATS[name], PUBLISHED.mamba_num_heads
    plain = declared_weights(PUBLISHED, CONTEXT, "bfloat16")
    few = {weight.name: how for weight in plain if weight.quantizable}
    assert {weight.role for weight in plain if weight.quantizable} <= set(QUANTIZABLE)
    parts = Counter(weight.part for weight in declared_weights(PUBLISHED, CONTEXT, "bfloat16", few))
    assert parts["values"] == parts["scale"] == len(few)
    assert parts["global_scale"] == (len(few) if how.scale_dtype else 0)
    by_name = {w.name: w for w in declared_weights(PUBLISHED, CONTEXT, "bfloat16", few)}
    joined = "context_tower.layers.0.mixer.in_proj.weight"
    values, dt = by_name[joined], by_name[f"{joined}.dt"]
    assert (dt.dtype, dt.part, dt.shape[0]) == ("bfloat16", "", heads)
    assert values.rows == (0, values.shape[0])
    assert dt.rows == (values.shape[0], values.shape[0] + heads)
    experts = by_name["context_tower.layers.1.mixer.experts.up_proj.weight.scale"]
    assert experts.shape == (128, 1856, 2688 // how.group if how.group else 1)


def test_published_sizes_take_no_time() -> None:
    started = time.perf_counter()
    for graph in GRAPHS:
        declared_weights(PUBLISHED, graph, "float16")
    assert time.perf_counter() - started < 5, "far less on an idle machine"
