"""Symptoms lead to the defects they are known by, and only where those can occur."""

from __future__ import annotations

import pytest

from twotower.doctor.known_issues import KNOWN_ISSUES, Setting, Symptom, explain
from twotower.hardware import TARGETS


def references(symptom: Symptom, **setting: object) -> list[str]:
    return [
        issue.reference
        for issue in explain([symptom], Setting(**{"target": "trt", "dtype": "float16", **setting}))
    ]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("symptom", "setting", "first"),
    [
        (Symptom.FIRST, {"sm": 120}, "NVIDIA/TensorRT #4837"),
        (Symptom.LATER, {"sm": 121, "dtype": "bfloat16", "target": "rtx"}, "NVIDIA/TensorRT #4837"),
        (Symptom.FIRST, {"sm": 89, "dtype": "float32"}, "NVIDIA/TensorRT #4813"),
        (Symptom.LATER, {"sm": 80, "dtype": "float32"}, "the libraries' documentation of TF32"),
        (Symptom.CRASHED, {"dtype": "bfloat16"}, "NVIDIA/TensorRT #4842"),
        (Symptom.NOT_FINITE, {}, "the range of the type"),
        (Symptom.ZEROS, {}, "pytorch/TensorRT #4481"),
        (Symptom.CONSTANT, {}, "pytorch/TensorRT #4481"),
        (Symptom.GRAPHS, {"target": "ort-cuda"}, "pytorch/TensorRT PR #4662"),
        (Symptom.ALONE, {"sm": 110}, "NVIDIA/TensorRT-Edge-LLM #105, #151"),
        (
            Symptom.FIRST,
            {"sm": 90, "operators": frozenset({"CumSum"})},
            "NVIDIA/TensorRT #4551, #4513",
        ),
        (
            Symptom.GROWN,
            {"operators": frozenset({"Attention"})},
            "NVIDIA/TensorRT-Model-Connect #955, #1035, #1047, #1048",
        ),
    ],
)
def test_the_closest_fit_comes_first(
    symptom: Symptom, setting: dict[str, object], first: str
) -> None:
    assert references(symptom, **setting)[0] == first


def test_nothing_fits_a_sound_engine_or_a_cpu() -> None:
    assert explain([], Setting(target="trt", dtype="float16", sm=120)) == ()
    assert explain(list(Symptom), Setting(target="ort-cpu", dtype="float32")) == ()


def test_an_issue_of_one_gpu_is_not_blamed_on_another() -> None:
    assert "NVIDIA/TensorRT #4837" not in references(Symptom.FIRST, sm=89)
    assert "NVIDIA/TensorRT #4842" not in references(Symptom.CRASHED, dtype="float16")


@pytest.mark.parametrize("issue", KNOWN_ISSUES, ids=lambda issue: issue.reference)
def test_every_issue_can_be_found_and_says_what_to_do(issue: object) -> None:
    assert isinstance(issue, type(KNOWN_ISSUES[0]))
    assert issue.do and issue.symptoms
    assert set(issue.targets) <= set(TARGETS)
    setting = Setting(
        target=issue.targets[0],
        dtype=(issue.dtypes or ("float16",))[0],
        sm=(issue.sms or (90,))[0],
        operators=frozenset(issue.operators),
    )
    for symptom in issue.symptoms:
        assert issue in explain([symptom], setting)
