"""Programs as plain data."""

from __future__ import annotations

import json

from tests.helpers.rtx_program_text import Described, Launch, program
from twotower.builders.trt.rtx_program.analysis import summarize_programs
from twotower.builders.trt.rtx_program.read import read_program_text


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
