"""The recorded graphs against the goldens and against themselves, before any file is written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tests.helpers.graphs import (
    FIXTURES,
    GraphRunner,
    fixture_weights,
    graph_with_weight_inputs,
    random_state,
    zero_state,
)
from twotower.config import read_model_config
from twotower.export.graphs.recorder import OPSET
from twotower.export.graphs.tower_graphs import build_graph
from twotower.spec import signatures

FOLDERS = ("hybrid-a", "hybrid-b")


@cache
def runner(folder: str) -> GraphRunner:
    path = FIXTURES / folder
    return GraphRunner(read_model_config(path / "config.json"), fixture_weights(path))


def denoise(
    run: GraphRunner, block: np.ndarray, past: int, state: dict, **options: float
) -> dict[str, np.ndarray]:
    rows, size = block.shape
    width = signatures(run.config, "float32")["denoiser"].tensor("noise").axes[2]
    return run(
        "denoiser",
        block=block,
        context_length=np.full(rows, past),
        threshold=np.full(rows, options.get("threshold", 0.9), np.float32),
        commit_floor=np.full(rows, int(options.get("floor", 1))),
        temperature=np.full(rows, options.get("temperature", 0.0), np.float32),
        noise=np.zeros((rows, size, width), np.float32),
        **state,
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_prompt_states_match_the_oracle(folder: str) -> None:
    run, path = runner(folder), FIXTURES / folder
    prompt = json.loads((path / "golden.json").read_text())[0]["prompt"]
    state, _ = run.extend(zero_state(run.config, 1, 64), [prompt], [0])
    checked = 0
    with safe_open(path / "golden.safetensors", "numpy") as golden:
        for layer in range(len(run.config.layers)):
            for theirs, ours in (
                ("conv_state", "past_conv.{}"),
                ("ssm_state", "past_ssm.{}"),
                ("key", "past_key_values.{}.key"),
                ("value", "past_key_values.{}.value"),
            ):
                name = f"case0.layer{layer}.{theirs}"
                if name not in golden.keys():  # noqa: SIM118
                    continue
                want, got = golden.get_tensor(name), state[ours.format(layer)]
                if theirs == "conv_state":  # theirs is [C,K-1]
                    want = want.swapaxes(-1, -2)
                got = got[:, :, : len(prompt)] if theirs in ("key", "value") else got
                assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), name
                checked += 1
        block = golden.get_tensor("case0.denoiser_block").reshape(1, -1).astype(np.int64)
        logits = golden.get_tensor("case0.denoiser_logits").reshape(block.shape[1], -1)
    logits = logits.astype(np.float64)
    assert checked == 2 * sum(kind.value in "M*" for kind in run.config.layers)
    logits[:, run.config.mask_token_id] = -np.inf
    best = np.exp(logits - logits.max(-1, keepdims=True))
    out = denoise(run, block, len(prompt), state)
    np.testing.assert_array_equal(out["predicted"][0], logits.argmax(-1))
    np.testing.assert_allclose(
        out["confidence"][0], (best / best.sum(-1, keepdims=True)).max(-1), atol=1e-4
    )


@pytest.mark.parametrize("name", ("context", "context_head", "denoiser"))
@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_graphs_are_well_formed_and_keep_the_contract(name: str, dtype: str) -> None:
    config = read_model_config(FIXTURES / "hybrid-b" / "config.json")
    graph = build_graph(name, config, dtype)
    proto = ir.to_proto(graph.model)
    # The data are not written yet: inline zeros let the checker see the types.
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            shape, code = list(tensor.dims), tensor.data_type
            zeros = onnx.helper.make_tensor(tensor.name, code, shape, np.zeros(shape, np.float32))
            tensor.CopyFrom(zeros)
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    assert [o.version for o in inferred.opset_import] == [OPSET]
    assert {n.domain for n in inferred.graph.node} == {""}, "standard operators only"
    signature = signatures(config, dtype)[name]
    for specs, values in (
        (signature.inputs, inferred.graph.input),
        (signature.outputs, inferred.graph.output),
    ):
        assert [s.name for s in specs] == [v.name for v in values]
        for spec, value in zip(specs, values, strict=True):
            dims = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            assert dims == spec.axes, spec.name
    used = {i for n in proto.graph.node for i in n.input}
    assert used >= {s.name for s in signature.inputs}, "every input is read"


@given(st.data())
def test_any_split_of_a_prompt_gives_the_same_state(data: st.DataObject) -> None:
    """Also with padding: the second row is shorter, so every chunk of it is ragged."""
    run = runner("hybrid-a")
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 250, (2, 40))
    lengths = np.array([40, data.draw(st.integers(1, 40))])
    whole, hidden = run.extend(zero_state(run.config, 2, 128), tokens, [0, 0], lengths)
    state, past = zero_state(run.config, 2, 128), np.zeros(2, np.int64)
    while (past < lengths).any():
        width = data.draw(st.integers(1, 25))
        count = np.minimum(lengths - past, width)
        chunk = np.stack(
            [
                np.pad(row[p : p + n], (0, width - n), constant_values=7)
                for row, p, n in zip(tokens, past, count, strict=True)
            ]
        )
        state, last = run.extend(state, chunk, past, count)
        if count[0]:
            final = last[0]
        past = past + count
    for name, want in whole.items():
        for row in range(2):
            a, b = want[row], state[name][row]
            if name.startswith("past_key_values"):
                a, b = a[:, : lengths[row]], b[:, : lengths[row]]
            assert np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(a).max()), name
    np.testing.assert_allclose(final, hidden[0], atol=1e-4)


def test_padding_and_unused_cache_leave_no_trace() -> None:
    run = runner("hybrid-b")
    state = random_state(run.config, 2, 32)
    tokens = np.random.default_rng(1).integers(4, 250, (2, 9))
    poisoned = {k: v.copy() for k, v in state.items()}
    for name, value in poisoned.items():
        if name.startswith("past_key_values"):
            value[:, :, 16:] = 1e4  # beyond what any row holds after this chunk
    other = tokens.copy()
    other[1, 4:] = 5
    a, hidden_a = run.extend(state, tokens, [7, 7], [9, 4])
    b, hidden_b = run.extend(poisoned, other, [7, 7], [9, 4])
    np.testing.assert_allclose(hidden_a, hidden_b, rtol=1e-6, atol=1e-6)
    for name in a:
        if not name.startswith("past_key_values"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-6, err_msg=name)
    block = np.array([[3, 9, 3, 3], [3, 3, 3, 8]])
    caches = {k: v for k, v in b.items() if k.startswith("past_key_values")}
    one, two = (denoise(run, block, 11, {**a, **own})["confidence"] for own in ({}, caches))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_row_without_tokens_keeps_its_state() -> None:
    run = runner("hybrid-a")
    state = random_state(run.config, 1, 32)
    after, _ = run.extend(state, [[9, 8, 7]], [5], [0])
    for name, value in state.items():
        got = after[name]
        if name.startswith("past_key_values"):
            value, got = value[:, :, :5], got[:, :, :5]
        np.testing.assert_allclose(got, value, rtol=1e-6, err_msg=name)


def test_rows_do_not_see_each_other() -> None:
    run = runner("hybrid-a")
    state = random_state(run.config, 3, 32)
    block = np.array([[3, 3, 3, 3], [3, 9, 3, 3], [5, 6, 7, 8]])
    together = denoise(run, block, 10, state)
    for row in range(3):
        mine = {k: v[row : row + 1] for k, v in state.items()}
        alone = denoise(run, block[row : row + 1], 10, mine)
        np.testing.assert_array_equal(alone["next_block"][0], together["next_block"][row])
        np.testing.assert_allclose(alone["confidence"][0], together["confidence"][row], atol=1e-5)
    assert together["masked_left"][2] == 0
    np.testing.assert_array_equal(together["next_block"][2], block[2])


def commit_rule(
    confidence: list[float], masked: list[bool], threshold: float, floor: int
) -> list[bool]:
    """The rule as its definition reads, with a sort."""
    places = [i for i, m in enumerate(masked) if m]
    sure = sum(confidence[i] > threshold for i in places)
    count = min(len(places), max(sure, 1, floor))
    chosen = sorted(places, key=lambda i: (-confidence[i], i))[:count]
    return [i in chosen for i in range(len(masked))]


@cache
def sampler_session():
    """The sampler alone: logits in, outputs out."""
    from twotower.export.graphs.recorder import GraphBuilder
    from twotower.export.graphs.sampler import mask_info, sample_and_commit
    from twotower.spec import TensorSpec, TowerSignature, denoiser_signature

    config = replace(read_model_config(FIXTURES / "hybrid-a" / "config.json"), vocab_size=8)
    full = denoiser_signature(config, "float32")
    logits = TensorSpec("logits", "float32", ("B", "S", 8))
    graph = GraphBuilder(
        TowerSignature("sampler", (*full.inputs[:1], *full.inputs[2:6], logits), full.outputs),
        "float32",
    )
    masks, _ = mask_info(graph, config)
    sample_and_commit(graph, graph.input("logits"), masks, config)
    import onnxruntime as ort

    return ort.InferenceSession(
        ir.to_proto(graph.finish()).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def sampled(
    logits: np.ndarray,
    block: np.ndarray,
    *,
    threshold: Sequence[float] = (0.9,),
    floor: Sequence[int] = (1,),
    temperature: float = 0.0,
    noise: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """What the sampler alone makes of logits [B,S,8]."""
    feeds = {
        "block": block,
        "threshold": np.float32(threshold),
        "commit_floor": np.int64(floor),
        "temperature": np.full(len(block), temperature, np.float32),
        "noise": np.zeros((*block.shape, 7), np.float32) if noise is None else noise,
        "logits": logits,
    }
    names = ("next_block", "predicted", "confidence", "masked_left")
    return dict(zip(names, sampler_session().run(names, feeds), strict=True))


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.1, 0.5, 0.5, 0.9, 0.97, 0.3]), st.booleans()),
        min_size=1,
        max_size=16,
    ),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    floor=st.integers(0, 20),
)
def test_commit_rule_is_its_definition(
    rows: list[tuple[float, bool]], threshold: float, floor: int
) -> None:
    """Confidences repeat on purpose: ties go to the left."""
    logits = np.full((1, len(rows), 8), -100.0, np.float32)
    # Two tokens share the mass, the first the larger part of it or not.
    for i, (p, _) in enumerate(rows):
        logits[0, i, 5], logits[0, i, 6] = math.log(p), math.log1p(-p)
    block = np.array([[3 if masked else 7 for _, masked in rows]])
    out = sampled(logits, block, threshold=[threshold], floor=[floor])
    confidence = out["confidence"][0].tolist()
    commit = commit_rule(confidence, [m for _, m in rows], np.float32(threshold), floor)
    want = np.where(commit, out["predicted"][0], block[0]).tolist()
    assert out["next_block"][0].tolist() == want
    assert out["masked_left"][0] == want.count(3)
    np.testing.assert_allclose(confidence, [max(p, 1 - p) for p, _ in rows], atol=1e-6)


def test_of_equal_confidences_the_further_left_is_committed_first() -> None:
    """Two rows of four equal masks each, of which the floor commits two, and three."""
    logits, block = np.zeros((2, 4, 8), np.float32), np.full((2, 4), 3)
    after = sampled(logits, block, threshold=[1, 1], floor=[2, 3])["next_block"]
    assert (after == 3).tolist() == [[False, False, True, True], [False, False, False, True]]


def test_noise_chooses_and_temperature_zero_does_not_listen() -> None:
    logits, noise = np.zeros((1, 1, 8), np.float32), np.zeros((1, 1, 7), np.float32)
    logits[0, 0, :3], noise[0, 0, 1] = (2.0, 1.0, 0.5), 10.0
    greedy, drawn = (
        sampled(logits, np.array([[3]]), temperature=heat, noise=noise) for heat in (0.0, 1.0)
    )
    assert (greedy["predicted"][0, 0], drawn["predicted"][0, 0]) == (0, 1)
    exact = np.exp(1.0) / np.exp(np.delete(logits[0, 0], 3)).sum()
    assert drawn["confidence"][0, 0] == pytest.approx(exact, rel=1e-6), (
        "confidence is the un-tempered probability without the mask token"
    )


@pytest.mark.parametrize("kind", ("float16", "bfloat16"))
def test_narrow_graphs_compute_the_same_when_widened(kind: str) -> None:
    """They differ in casts only: widened and fed the same weights they must agree."""
    path = FIXTURES / "hybrid-a"
    config, tensors = read_model_config(path / "config.json"), fixture_weights(path)
    wide, narrow = runner("hybrid-a"), GraphRunner(config, tensors, kind)
    state = random_state(config, 1, 32)
    block = np.array([[3, 3, 9, 3, 3, 3, 3, 12]])
    got, want = (denoise(run, block, 9, state)["confidence"] for run in (narrow, wide))
    np.testing.assert_allclose(got, want, atol=1e-5)
    model, _ = graph_with_weight_inputs(config, "context", tensors, kind)
    assert not {t.type.tensor_type.elem_type for t in model.graph.input} & {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    }
