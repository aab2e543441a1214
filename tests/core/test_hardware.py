"""Which target a machine gets, for machines this one is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twotower.errors import ConfigError, EngineMismatchError
from twotower.hardware import TARGETS, Gpu, Machine, probe_machine, select_target, untried

ALL = {"tensorrt": "11.4", "tensorrt-rtx-cu13": "1.7", "onnxruntime-gpu": "1.31"}
RTX4090, H100 = Gpu("RTX 4090", 89, 24 << 30), Gpu("H100", 90, 80 << 30)


def machine(*gpus: Gpu, **libraries: str) -> Machine:
    return Machine(
        "test", 8, 64 << 30, gpus, {k.replace("_", "-"): v for k, v in libraries.items()}
    )


@pytest.mark.parametrize(
    ("here", "built", "want"),
    [
        (machine(RTX4090, **ALL), TARGETS, "trt"),
        (machine(RTX4090, **ALL), ("rtx", "ort-cpu"), "rtx"),
        (machine(H100, **ALL), ("rtx", "ort-cuda"), "ort-cuda"),
        (machine(RTX4090, **ALL), {"trt": (90,), "rtx": (86, 89), "ort-cpu": ()}, "rtx"),
        (machine(RTX4090, **ALL), {"rtx": (120,), "ort-cuda": (), "ort-cpu": ()}, "ort-cuda"),
        (machine(H100, RTX4090, **ALL), {"rtx": (89,), "ort-cpu": ()}, "rtx"),
        (machine(**ALL), TARGETS, "ort-cpu"),
        (machine(onnxruntime="1.32"), ("ort-cpu",), "ort-cpu"),
    ],
)
def test_best_target_that_fits(
    here: Machine, built: tuple[str, ...] | dict[str, tuple[int, ...]], want: str
) -> None:
    assert select_target(here, built) == want


@pytest.mark.parametrize("how", ["default", "current"])
def test_a_person_may_try_rtx_on_a_gpu_it_does_not_list(how: str) -> None:
    """Whatever the engines were built for; full TensorRT is as it was."""
    here = replace(machine(H100, tensorrt_rtx_cu13="1.7", tensorrt="11.4"), rtx_any_sm=how)
    for sms in ((), (89,), (90,)):
        assert select_target(here, {"rtx": sms}) == "rtx"
    with pytest.raises(EngineMismatchError, match="no engine fits"):
        select_target(here, {"trt": (89,)}, wanted="trt")
    with pytest.raises(EngineMismatchError, match="no engine fits"):
        select_target(replace(here, gpus=()), {"rtx": ()}, wanted="rtx")


def test_what_is_untried_is_said_in_words() -> None:
    said = untried("current", [90])
    assert "TWOTOWER_RTX_ANY_SM=current" in said
    assert "SM 90: NVIDIA does not support it there" in said
    assert "a GPU beyond its list: NVIDIA" in untried("default", [89])
    assert "never tried by us" in said


def test_the_environment_says_so_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "default", "current"):
        monkeypatch.setenv("TWOTOWER_RTX_ANY_SM", value)
        assert probe_machine().rtx_any_sm == value
    monkeypatch.setenv("TWOTOWER_RTX_ANY_SM", "yes")
    with pytest.raises(ConfigError, match="TWOTOWER_RTX_ANY_SM=yes cannot be used") as caught:
        probe_machine()
    assert "default, current" in caught.value.found


def test_every_rejection_has_its_reason() -> None:
    with pytest.raises(EngineMismatchError) as caught:
        select_target(machine(H100, tensorrt_rtx_cu13="1.7"), ("rtx",))
    assert "does not list SM 90" in caught.value.found
    assert "TWOTOWER_RTX_ANY_SM=current" in caught.value.found
    assert "ort-cpu: not built" in caught.value.found
    with pytest.raises(EngineMismatchError) as caught:
        select_target(machine(RTX4090, tensorrt_rtx_cu13="1.7"), {"rtx": (86, 120)}, wanted="rtx")
    assert "built for SM 86, 120, the GPU is SM 89" in caught.value.found
    with pytest.raises(EngineMismatchError, match="no engine fits"):
        select_target(machine(tensorrt="11.4"), ("trt",), wanted="trt")
    with pytest.raises(EngineMismatchError, match="unknown target"):
        select_target(machine(), (), wanted="tpu")


@pytest.mark.parametrize(
    ("here", "built", "want"),
    [
        (machine(tensorrt_rtx_cu13="1.7"), ("ort-cpu",), "pip install 'twotower[cpu]'"),
        (machine(RTX4090), ("rtx", "ort-cpu"), "pip install 'twotower[rtx]'"),
        (machine(onnxruntime="1.32"), ("rtx",), "twotower build BUNDLE --target ort-cpu"),
        (machine(), (), "twotower build BUNDLE --target ort-cpu"),
    ],
)
def test_a_built_target_that_lacks_its_library_alone_names_the_extra(
    here: Machine, built: tuple[str, ...], want: str
) -> None:
    with pytest.raises(EngineMismatchError) as caught:
        select_target(here, built)
    assert want in caught.value.do


def test_two_onnxruntimes_are_a_conflict_and_say_so() -> None:
    both = machine(onnxruntime="1.32", onnxruntime_gpu="1.31")
    assert both.conflict
    with pytest.raises(EngineMismatchError, match="ort-cpu") as caught:
        select_target(both, ("ort-cpu",))
    assert "pip uninstall" in caught.value.found


def test_probe_describes_this_machine() -> None:
    here = probe_machine()
    assert here.cpus >= 1
    assert here.memory > 0
    assert here.conflict is None, here.conflict
