"""Which layer a kernel counts for, and programs as plain data."""

from __future__ import annotations

import json

import pytest

from tests.helpers.rtx_program_text import Described, Launch, program
from twotower.builders.trt.rtx_program.analysis import (
    SHARED,
    summarize_programs,
    with_scopes,
)
from twotower.builders.trt.rtx_program.program import Kernel
from twotower.builders.trt.rtx_program.read import read_program_text


def kernel(nodes: str, *, reads: str = "", writes: str = "y") -> Kernel:
    names, read, written = (tuple(words.split()) for words in (nodes, reads, writes))
    return Kernel("function", "k", 0, names, "", "", read, written)


@pytest.mark.parametrize(
    ("nodes", "scope"),
    [
        ("layers.3.moe/MatMul layers.3.moe/Relu", "layers.3.moe"),
        (
            "layers.2.mamba/Add layers.3.moe/Cast layers.3.moe/RMSNormalization shared/Cast",
            "layers.3.moe",
        ),
        (
            "layers.1.moe/Add_2 layers.1.moe/Cast layers.2.mamba/Cast layers.0.mamba/Add",
            "layers.1.moe",
        ),
        (
            "conditioning/Reshape " + " ".join(f"layers.{i}.moe/Add" for i in range(9)),
            "conditioning",
        ),
        (" ".join(f"layers.{i}.moe/Add" for i in range(9)), SHARED),
        ("sampler/Add lm_head/Cast sampler/TopK", "sampler"),
        ("MatMul Cast", "graph"),
    ],
)
def test_a_kernel_counts_for_the_layer_most_of_it_is_of(nodes: str, scope: str) -> None:
    (found,) = with_scopes([kernel(nodes)])
    assert found.scope == scope


def test_a_kernel_without_nodes_counts_for_its_reader_and_else_for_the_one_before() -> None:
    first, second = kernel("", writes="a"), kernel("", reads="a", writes="b")
    before, reader = kernel("layers.0.mamba/Conv"), kernel("layers.1.moe/MatMul", reads="b")
    found = with_scopes([first, second, before, reader, kernel("", writes="e")])
    moe = "layers.1.moe"
    assert [k.scope for k in found] == [moe, moe, "layers.0.mamba", moe, moe]


def test_kernels_are_counted_by_kind_and_fusions_told_once_a_kind() -> None:
    launches = [
        Launch("__myl_Gath", ["tokens.1"], ["h"], ["embed/Gather"]),
        Launch(
            "__myl_FcMul",
            ["h"],
            ["h"],
            ["layers.0.moe/MatMul", "layers.0.moe/Mul"],
            "runtime_fusion",
        ),
        Launch("__myl_Add", ["h"], ["h"], ["layers.1.mamba/Add"]),
        Launch("__myl_FcMul", ["h"], ["h"], ["layers.2.moe/MatMul"], "runtime_fusion"),
        Launch("__myl_Tran", ["h"], ["y.1"], ["layers.2.moe/Transpose"]),
    ]
    (told,) = summarize_programs([read_program_text(program(launches=launches).text())])["programs"]
    assert told["kernels"] == 5
    assert told["by_kind"]["moe"] == {"layers": 2, "kernels": 3, "min": 1, "max": 2}
    assert told["by_operation"] == {"function": 3, "runtime_fusion": 2}
    assert told["by_backbone"] == {"gemm": 2}
    assert told["fused"] == {
        "embed": [["__myl_Gath", "embed/Gather"]],
        "layers.0.moe": [["__myl_FcMul", "layers.0.moe/MatMul", "layers.0.moe/Mul"]],
        "layers.1.mamba": [["__myl_Add", "layers.1.mamba/Add"]],
    }


def test_copies_are_told_and_all_of_it_is_json() -> None:
    tensors = [
        Described("q", [8, 64, 32], "int8", "p-consts"),
        Described("copy", [8, 64, 32], "bf16", "scratch_1"),
    ]
    launches = [Launch("__myl_Cast", ["q"], ["copy"], ["layers.3.moe/DequantizeLinear"])]
    told = summarize_programs(
        [read_program_text(program(inputs=["tokens.1"], tensors=tensors, launches=launches).text())]
    )
    assert json.loads(json.dumps(told))["programs"][0]["expanded"] == [
        {
            "kernel": "__myl_Cast",
            "scope": "layers.3.moe",
            "nodes": ["layers.3.moe/DequantizeLinear"],
            "weights": ["q int8 [8, 64, 32]"],
            "dims": [8, 64, 32],
            "dtype": "bf16",
            "nbytes": 32768,
            "stacked": True,
        }
    ]
