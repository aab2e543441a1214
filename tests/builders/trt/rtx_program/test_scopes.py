"""Which layer a kernel counts for."""

from __future__ import annotations

import pytest

from twotower.builders.trt.rtx_program.analysis import SHARED, kind_of, with_scopes
from twotower.builders.trt.rtx_program.program import Kernel


def kernel(nodes: str, *, reads: str = "", writes: str = "y") -> Kernel:
    return Kernel(
        "function",
        "k",
        0,
        tuple(nodes.split()),
        "",
        "",
        tuple(reads.split()),
        tuple(writes.split()),
    )


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
    found = with_scopes(
        [
            kernel("", writes="a"),
            kernel("", reads="a", writes="b"),
            kernel("layers.0.mamba/Conv", writes="c"),
            kernel("layers.1.moe/MatMul", reads="b", writes="d"),
            kernel("", writes="e"),
        ]
    )
    assert [k.scope for k in found] == [
        "layers.1.moe",
        "layers.1.moe",
        "layers.0.mamba",
        "layers.1.moe",
        "layers.1.moe",
    ]


def test_kinds() -> None:
    assert [kind_of(s) for s in ("layers.12.attention", "sampler", "graph")] == [
        "attention",
        "sampler",
        "graph",
    ]
