"""Weights that a pass copies to device memory are found in every form, and nothing else is."""

from __future__ import annotations

import pytest

from tests.helpers.rtx_program_text import Described, Launch, program
from twotower.builders.trt.rtx_program.program import ExpandedWeight, Program
from twotower.builders.trt.rtx_program.read import read_program_text

STACK = Described("q", [8, 64, 32], "int8", "p-consts")
SCALES = Described("s", [8, 1, 32], "bf16", "p-consts")
BIAS = Described("tower.bias.1", [32], "bf16")
COPY = Described("copy", [8, 64, 32], "bf16", "scratch_1")
X = Described("tokens.1", ["rows.1", 64])
Y = Described("y.1", ["rows.1", 32])
MATRIX = Described("tower.layers.0.mixer.up.weight.1", [32, 64])
NODES = ["layers.0.moe/DequantizeLinear", "layers.0.moe/Transpose"]
PRODUCT = Launch(
    "MatMul", ["tokens.1", "copy"], ["y.1"], ["layers.0.moe/MatMul"], "fully_connected"
)


def read(tensors: list[Described], launches: list[Launch]) -> Program:
    inputs = ["tokens.1", "tower.bias.1", MATRIX.name, "present.5.key.1", "past_conv.0.1"]
    return read_program_text(program(inputs=inputs, tensors=tensors, launches=launches).text())


def found(tensors: list[Described], launches: list[Launch]) -> list[ExpandedWeight]:
    return list(read([X, Y, BIAS, MATRIX, *tensors], launches).expanded)


def test_a_stack_dequantized_in_a_kernel_of_its_own() -> None:
    dequantize = Launch("__myl_CastMulCast", ["s", "q"], ["copy"], NODES)
    (copy,) = found([STACK, SCALES, COPY], [dequantize, PRODUCT])
    assert (copy.kernel, copy.scope) == ("__myl_CastMulCast", "layers.0.moe")
    assert (copy.nodes, copy.dims, copy.dtype) == (tuple(NODES), (8, 64, 32), "bf16")
    assert (copy.nbytes, copy.stacked) == (8 * 64 * 32 * 2, True)
    assert copy.weights == ("s bf16 [8, 1, 32]", "q int8 [8, 64, 32]")


def test_dequantization_inside_the_product_is_none() -> None:
    fused = Launch("__myl_CastMulCastFc", ["tokens.1", "q", "s"], ["y.1"], NODES, "runtime_fusion")
    assert not found([STACK, SCALES], [fused])


def test_a_weight_that_is_an_input_and_is_turned_round() -> None:
    turned = Described("copy", [64, 32], "bf16", "scratch_1")
    turn = Launch("__myl_Tran", [MATRIX.name], ["copy"], ["layers.0.moe/Transpose"])
    (copy,) = found([turned], [turn, PRODUCT])
    assert copy.weights == ("tower.layers.0.mixer.up.weight bf16 [32, 64]",)
    assert not copy.stacked


def test_in_two_steps_each_copy_counts() -> None:
    scales = Described("t", [8, 64, 32], "bf16", "scratch_0")
    steps = [Launch("__myl_Repl", ["s"], ["t"]), Launch("__myl_Mul", ["q", "t"], ["copy"], NODES)]
    copies = found([STACK, SCALES, COPY, scales], [*steps, PRODUCT])
    assert [c.kernel for c in copies] == ["__myl_Repl", "__myl_Mul"]


def test_memory_that_held_a_copy_and_holds_activations_later_is_none() -> None:
    """Names stand for memory: the same one is written twice."""
    again = Described("h", [8, 64, 32], "bf16", "scratch_0")
    steps = [
        Launch("__myl_Cast", ["q"], ["copy"], NODES),
        Launch("__myl_Add", ["tokens.1"], ["copy"], ["layers.0.moe/Add"]),
        Launch("__myl_Mul", ["copy"], ["h"], ["layers.0.moe/Mul"]),
        PRODUCT,
    ]
    assert [c.kernel for c in found([STACK, COPY, again], steps)] == ["__myl_Cast"]


def test_a_copy_beside_other_work_is_found_by_its_shape_and_its_reader() -> None:
    mixed = Launch(
        "__myl_MulCastAdd", ["q", "tokens.1"], ["copy", "h"], [*NODES, "layers.0.moe/Add"]
    )
    other = Described("h", ["rows.1", 64], "bf16", "scratch_0")
    assert [c.nbytes for c in found([STACK, COPY, other], [mixed, PRODUCT])] == [8 * 64 * 32 * 2]
    unread = Launch("MatMul", ["tokens.1", "h"], ["y.1"], operation="fully_connected")
    assert not found([STACK, COPY, other], [mixed, unread])


@pytest.mark.parametrize(
    ("dims", "dtype", "region", "kernel", "reads"),
    [
        ([32], "float", "scratch_0", "__myl_Resh", ["tower.bias.1"]),
        (["rows.1", 64], "bf16", "scratch_0", "__myl_Gath", ["tokens.1", MATRIX.name]),
        ([8, 32], "bf16", "p-consts", "__myl_Cast", ["tower.bias.1"]),
        ([32, 32], "float", "scratch_0", "__myl_Iota", []),
    ],
    ids=["a bias", "a row of an embedding", "no memory for activations", "made of nothing"],
)
def test_what_is_no_copy_of_a_weight(
    dims: list[int | str], dtype: str, region: str, kernel: str, reads: list[str]
) -> None:
    assert not found([Described("m", dims, dtype, region)], [Launch(kernel, reads, ["m"])])


KEYS = Described("present.5.key.1", ["rows.1", 2, 512, 16])


@pytest.mark.parametrize(
    ("name", "dims", "times"),
    [
        ("__myl_ReshReplReshMove", ["rows.1", 8, 512, 16], 4),
        ("__myl_Tran", ["rows.1", 2, 16, 512], 1),
        ("__myl_Move", [16, 512, 16], 1),
    ],
)
def test_keys_written_again_before_attention_reads_them(
    name: str, dims: list[int | str], times: int
) -> None:
    copy = Described("k", dims, "bf16", "scratch_0")
    made = read([KEYS, copy], [Launch(name, [KEYS.name], ["k"], ["layers.5.attention/Attention"])])
    (found,) = made.copied
    assert (found.cache, found.scope, found.times) == ("present.5.key", "layers.5.attention", times)
    assert found.nbytes == times * 8 * 2 * 512 * 16 * 2


def test_keys_that_are_updated_or_read_where_they_are() -> None:
    scores = Described("h", ["rows.1", 8, 16], "bf16", "scratch_0")
    same_size = Described("m", ["rows.1", 2, 32, 256], "bf16", "scratch_0")
    launches = [
        Launch(
            "__myl_Scat", ["tokens.1", KEYS.name], [KEYS.name], ["layers.5.attention/TensorScatter"]
        ),
        Launch("_gemv_mha_v1", [KEYS.name], ["h"], ["layers.5.attention/Attention"]),
        Launch("MatMul", ["tokens.1", KEYS.name], ["m"], operation="fully_connected"),
        Launch("__myl_Add", [KEYS.name], ["m"], ["layers.5.attention/Add"]),
    ]
    assert not read([X, KEYS, scores, same_size], launches).copied
