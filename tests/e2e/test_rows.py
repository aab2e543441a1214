"""A row of a batch is computed as if it were alone, whatever the others are and hold."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.bundle import Bundle, engine_folder
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER

Arrays = dict[str, np.ndarray]
ROWS, CAPACITY = 6, 96
CHOSEN = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS + 2)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, contents=False)


@cache
def session(path: Path, name: str) -> ort.InferenceSession:
    """An engine as the runtime opens it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        str(path),
    )
    engine = engine_folder(Bundle.open(path, contents=False), "ort-cpu") / f"{name}.onnx"
    return ort.InferenceSession(engine.read_bytes(), options, providers=["CPUExecutionProvider"])


def feeds(bundle: Bundle, name: str, length: int) -> Arrays:
    """Rows that differ in everything: tokens, lengths, state, options."""
    rng = np.random.default_rng(length)
    sizes = {"B": ROWS, "L": length, "S": length, "T": CAPACITY}
    out: Arrays = {}
    for spec in bundle.signatures[name].inputs:
        shape = spec.shape(sizes)
        most = {"chunk_length": length + 1, "past_length": 60, "context_length": 60}
        if spec.dtype == "int64":
            out[spec.name] = rng.integers(1, most.get(spec.name, 250), shape)
        else:
            out[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    if name == DENOISER:
        out["block"][:, ::2] = bundle.config.mask_token_id
        out["temperature"] = np.float32([0, 0.5, 1, 0, 2, 0.1])
        out["commit_floor"] = rng.integers(1, 4, ROWS)
    return out


def run(bundle: Bundle, name: str, given: Arrays, rows: list[int]) -> Arrays:
    opened = session(bundle.path, name)
    names = [output.name for output in opened.get_outputs()]
    picked = {key: np.ascontiguousarray(value[rows]) for key, value in given.items()}
    return dict(zip(names, opened.run(names, picked), strict=True))


def check(bundle: Bundle, name: str, length: int, rows: list[int]) -> None:
    given = feeds(bundle, name, length)
    every, some = run(bundle, name, given, list(range(ROWS))), run(bundle, name, given, rows)
    for key, value in every.items():
        np.testing.assert_array_equal(some[key], value[rows], err_msg=f"{name} {key}")


@pytest.mark.parametrize("name", [CONTEXT, DENOISER])
@given(length=st.sampled_from([2, 7, 16, 33]), rows=CHOSEN)
def test_to_the_bit_in_any_batch(bundle: Bundle, name: str, length: int, rows: list[int]) -> None:
    check(bundle, name, length, rows)


@given(rows=st.lists(st.integers(0, ROWS - 1), min_size=2, max_size=ROWS + 2))
def test_one_token_at_a_time_to_the_bit_too(bundle: Bundle, rows: list[int]) -> None:
    check(bundle, CONTEXT, 1, rows)
    check(bundle, CONTEXT_HEAD, 1, rows)


@given(row=st.integers(0, ROWS - 1))
def test_a_single_token_alone_differs_in_the_last_bits(bundle: Bundle, row: int) -> None:
    """ONNX Runtime multiplies a vector with another kernel than a matrix of two rows and more."""
    given = feeds(bundle, CONTEXT, 1)
    every = run(bundle, CONTEXT, given, list(range(ROWS)))
    alone = run(bundle, CONTEXT, given, [row])
    for key, value in every.items():
        np.testing.assert_allclose(alone[key][0], value[row], rtol=1e-4, atol=1e-4, err_msg=key)
