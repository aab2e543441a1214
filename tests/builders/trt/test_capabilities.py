"""What an engine is built for: what is asked for, what the GPUs are, or what a person wants tried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import FakeBuilder, FakeTensorRT, fake_job
from tests.helpers.trt.install import machine_with
from twotower.builders import BuildConfig, build_engines
from twotower.builders.trt import make_engine, tensorrt_builder
from twotower.builders.trt.capabilities import Capabilities, chosen_capabilities
from twotower.builders.trt.network import NetworkOptions, _configured
from twotower.bundle import Bundle, engine_folder
from twotower.errors import BuildError
from twotower.hardware import Gpu, Machine
from twotower.tensorrt_library import Variant

H100, ADA, TURING = Gpu("H100", 90, 80 << 30), Gpu("L4", 89, 24 << 30), Gpu("T4", 75, 16 << 30)
RTX = Variant(
    SimpleNamespace(__name__="tensorrt_rtx"), "rtx", "1.7", (75, 80, 86, 89, 120, 121), True, True
)
TRT = Variant(SimpleNamespace(__name__="tensorrt"), "trt", "11.4", (), False, False)


def tried(how: str, *gpus: Gpu) -> Machine:
    return replace(machine_with(*gpus), rtx_any_sm=how)


@pytest.mark.parametrize(
    ("variant", "asked", "machine", "want"),
    [
        (RTX, (89, 86), tried(""), Capabilities((86, 89), (86, 89))),
        (RTX, (), tried(""), Capabilities((86, 89, 120), (86, 89, 120))),
        (RTX, (), tried("", ADA), Capabilities((89,), (89,))),
        (RTX, (), tried("", H100), Capabilities((86, 89, 120), (86, 89, 120))),
        (RTX, (), tried("default", H100), Capabilities(())),
        (RTX, (), tried("default"), Capabilities(())),
        (RTX, (), tried("current", H100), Capabilities((90,), current=True)),
        (RTX, (80,), tried("current", H100), Capabilities((80,), (80,))),
        (TRT, (), tried("current", H100), Capabilities((90,))),
    ],
)
def test_what_is_built_for(
    bundle: Bundle,
    variant: Variant,
    asked: tuple[int, ...],
    machine: Machine,
    want: Capabilities,
) -> None:
    assert chosen_capabilities(variant, bundle, BuildConfig(sms=asked), machine) == want


@pytest.mark.parametrize(
    ("variant", "asked", "machine", "says"),
    [
        (RTX, (90,), tried("current", H100), "does not build for SM 90"),
        (RTX, (), tried("current"), "builds for the GPU at hand only"),
        (TRT, (89,), tried("", ADA), "builds for the GPU at hand only"),
    ],
)
def test_what_is_not(
    bundle: Bundle, variant: Variant, asked: tuple[int, ...], machine: Machine, says: str
) -> None:
    with pytest.raises(BuildError, match=says):
        chosen_capabilities(variant, bundle, BuildConfig(sms=asked), machine)


def test_another_choice_builds_again_and_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs: list[dict[str, Any]] = []

    def noted(job: dict[str, Any], scratch: Path, *, tick: Any) -> dict[str, Any]:
        jobs.append(job)
        return fake_job(job, scratch, tick=tick)

    monkeypatch.setattr(make_engine, "run_job", noted)
    builder = FakeBuilder(FakeTensorRT(FakeCuda()))
    seen = []
    for how, asked in (("", (89,)), ("default", ()), ("current", ()), ("current", ())):
        monkeypatch.setattr(tensorrt_builder, "probe_machine", lambda how=how: tried(how, H100))
        config = BuildConfig(sms=asked, max_context=256, experts="dense")
        record = build_engines(bundle, "rtx", builder, config=config)
        assert record.limits is not None
        seen.append((record.limits.sms, len(jobs), jobs[-1]["sms"], jobs[-1]["current"]))
    three = [((89,), 3, [89], False), ((), 6, [], False), ((90,), 9, [], True)]
    assert seen == [*three, three[-1]], "the last one was built before"
    assert caplog.text.count("SM 90: NVIDIA does not support it there") == 2
    assert engine_folder(bundle, "rtx").is_dir()


class _Config(SimpleNamespace):
    """A builder's configuration that notes capabilities."""

    def clear_flag(self, flag: str) -> None: ...

    def set_flag(self, flag: str) -> None: ...

    def set_compute_capability(self, capability: str, slot: int) -> bool:
        self.capabilities[slot] = capability
        return bool(self.takes)


@pytest.mark.parametrize(
    ("sms", "current", "want"),
    [((86, 89), False, {0: "sm86", 1: "sm89"}), ((), True, {0: "current"}), ((), False, {})],
)
def test_what_the_library_is_told(
    sms: tuple[int, ...], current: bool, want: dict[int, str]
) -> None:
    config = _Config(capabilities={}, num_compute_capabilities=0, takes=True)
    module = SimpleNamespace(__name__="tensorrt_rtx", IProgressMonitor=object)
    module.ComputeCapability = SimpleNamespace(CURRENT="current", SM86="sm86", SM89="sm89")
    module.BuilderFlag = SimpleNamespace(TF32="tf32", REQUIRE_USER_ALLOCATION="user")
    module.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    variant = replace(RTX, module=module)
    options = NetworkOptions(inputs=(), profiles=(), sms=sms, current=current, dtype="float16")
    builder = SimpleNamespace(create_builder_config=lambda: config)
    _configured(variant, builder, options, tick=lambda *_: True)
    assert config.capabilities == want
    assert config.num_compute_capabilities == len(want)
    config.takes = False
    if want:
        with pytest.raises(BuildError):
            _configured(variant, builder, options, tick=lambda *_: True)
