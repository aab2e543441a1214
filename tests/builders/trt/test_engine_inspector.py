"""What is told of an engine: of RTX from its plan; of TensorRT by its inspector, which needs a GPU: a fake tells it here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rtx_program_text import plan_of, program
from tests.helpers.trt.install import L4, install_fake, machine_with
from twotower.builders.trt.engine_inspector import inspect_plan, summarize_layers
from twotower.hardware import Gpu
from twotower.tensorrt_library import Variant, variant_from_module


@pytest.fixture
def variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Variant:
    return variant_from_module(install_fake(tmp_path, monkeypatch))


def test_fused_layers_are_counted(variant: Variant) -> None:
    told = inspect_plan(variant, memoryview(b"plan"), machine_with(L4))
    assert told == {
        "layers": 3,
        "by_type": {"kgen": 2, "gemm": 1},
        "by_precision": {"Half": 1, "Float": 1, "none": 1},
    }


@pytest.mark.parametrize(
    ("plan", "gpus", "why"),
    [
        (b"plan", (), "no GPU"),
        (b"damaged", (L4,), "the plan is not one"),
        (b"plan" * 9, (Gpu("small", 75, 71),), "may not fit"),
    ],
)
def test_what_cannot_be_inspected_says_why(
    variant: Variant, plan: bytes, gpus: tuple[Gpu, ...], why: str
) -> None:
    assert why in inspect_plan(variant, memoryview(plan), machine_with(*gpus))["why_not"]


def test_a_library_that_fails_here_costs_no_engine(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(variant.module.Runtime, "deserialize_cuda_engine", fail)
    assert inspect_plan(variant, memoryview(b"plan"), machine_with(L4)) == {
        "why_not": "RuntimeError: out of memory"
    }


def test_layers_told_by_name_alone_are_counted_alone() -> None:
    """What the library writes for an engine without detailed profiling."""
    told = {"layers": 2, "by_type": {}, "by_precision": {}}
    assert summarize_layers({"Layers": ["a", "b"]}) == told


def test_of_rtx_the_program_in_the_plan_is_told_without_a_gpu() -> None:
    rtx = Variant(None, "rtx", "1.7", (89,), runtime_cache=True, capturable=True)
    plan = memoryview(plan_of(program().text()))
    (told,) = inspect_plan(rtx, plan, machine_with(), profiles=1)["programs"]
    facts = ("kernels", "streams", "capturable", "scratch", "expanded")
    assert [told[fact] for fact in facts] == [2, 1, True, 5120, []]
    other = memoryview(plan_of(program(layout=9).text()))
    for damaged, profiles in ((plan[:-400], 1), (plan, 3), (other, 1)):
        told = inspect_plan(rtx, damaged, machine_with(L4), profiles=profiles)
        assert "not read" in told["why_not"]
        assert told.keys() == {"why_not"}, "a figure that may be wrong is none"
