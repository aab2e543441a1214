"""GPUs by name, which of them the published model fits, and what alternatives really take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.published import PUBLISHED, of_layers
from twotower.calibration.recipes import builtin_recipes
from twotower.config.formats import stack_is_expanded
from twotower.config.model import ModelConfig
from twotower.errors import ConfigError
from twotower.hardware import Gpu
from twotower.planning import GPUS, GpuModel, PlanOptions, fit, gpu_at_hand, gpus_named
from twotower.planning.devices import device_needs
from twotower.planning.expert_path import left_out
from twotower.planning.fit import ASSUMED_DISK_RATE, LoadTime, largest_batch, largest_context
from twotower.planning.pass_cost import pass_costs
from twotower.planning.weights import EXPERT_FORMATS, EXPERT_RECIPES

TRT = PlanOptions(target="trt")


def applied(options: PlanOptions, flags: str) -> PlanOptions:
    """The options with flags typed as an alternative says them."""
    words = flags.split()
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    given = dict(zip(names, words[1::2], strict=True))
    return replace(options, **{k: int(v) if v.isdigit() else v for k, v in given.items()})  # type: ignore[arg-type]


def test_rtx_does_not_list_data_centre_gpus() -> None:
    fits = fit(PUBLISHED, PlanOptions(target="rtx"), GPUS)
    assert {f.gpu.sm for f in fits if f.refused} == {90, 100}
    assert all("--target trt" in f.refused and not f.fits for f in fits if f.gpu.sm in (90, 100))


@pytest.mark.slow
@given(
    memory=st.integers(10 * 10**9, 200 * 10**9),
    rows=st.integers(1, 32),
    devices=st.sampled_from([1, 2]),
)
def test_alternatives_are_what_the_plan_with_their_flags_says(
    memory: int, rows: int, devices: int
) -> None:
    options = replace(TRT, max_batch=rows, devices=devices)
    (found,) = fit(PUBLISHED, options, [GpuModel("some", memory, 89, 10**12)])
    assert found.fits == (max(d.total for d in found.devices) <= memory)
    assert not (found.fits and found.alternatives)
    for alternative in found.alternatives:
        changed = applied(options, alternative.flags)
        assert max(d.total for d in device_needs(PUBLISHED, changed)) == alternative.needs
        assert alternative.fits == (alternative.needs <= memory)
        assert bool(alternative.recipe) == ("--experts" in alternative.flags)


EIGHT_BITS = {"int8", "fp8"}


@pytest.mark.parametrize(
    ("target", "path", "formats"),
    [
        ("rtx", "auto", set(EXPERT_FORMATS)),
        ("trt", "auto", set(EXPERT_FORMATS)),
        ("rtx", "dense", {*EIGHT_BITS, "int4"}),
        ("trt", "dense", {*EIGHT_BITS, "int4"}),
        ("ort-cuda", "auto", {"int8", "int4"}),
        ("ort-cuda", "dense", set()),
    ],
)
@pytest.mark.parametrize("gpu", ["RTX 4090", "RTX 5090", "RTX PRO 6000"])
def test_no_alternative_is_slower_than_what_it_replaces(
    target: str, path: str, formats: set[str], gpu: str
) -> None:
    """A pass that expands its experts moves more bytes than one of float experts."""
    options = PlanOptions(target=target, expert_path=path)
    (found,) = fit(PUBLISHED, options, gpus_named(gpu))
    changed = [applied(options, a.flags) for a in found.alternatives]
    assert {o.experts for o in changed if o.experts} == formats
    assert set(left_out(PUBLISHED, options)) == set(EXPERT_FORMATS) - formats
    recipes = builtin_recipes()
    floats = pass_costs(PUBLISHED, options).denoising
    assert floats is not None
    for name in EXPERT_FORMATS:
        moved = pass_costs(PUBLISHED, replace(options, experts=name)).denoising
        assert moved is not None
        assert (moved.expanded > 0) == (name not in formats)
        assert (moved.nbytes < floats.nbytes) == (name in formats)
        recipe = recipes[EXPERT_RECIPES[name]]
        assert recipe.weights["routed_expert"] == name
        if name in formats and path == "dense" and target != "ort-cuda":
            assert not stack_is_expanded(
                target, name, rounded_input="routed_expert" in recipe.activations
            )
    assert not left_out(PUBLISHED, replace(options, formats=(("routed_expert", "int4"),))), (
        "a quantized bundle has no other experts"
    )


def test_formats_are_offered_where_the_hardware_has_them() -> None:
    """Kernels read any format, but 8-bit recipes narrow layers that the engines multiply."""

    def offered(sm: int, path: str) -> set[str | None]:
        options, gpu = replace(TRT, expert_path=path), GpuModel("some", 90 * 10**9, sm, 10**12)
        (found,) = fit(PUBLISHED, options, [gpu])
        changed = [applied(options, a.flags) for a in found.alternatives]
        return {o.experts for o in changed if o.experts}

    assert offered(86, "auto") == {"int8", "int4", "nvfp4"}
    assert offered(89, "auto") == {"int8", "fp8", "int4", "nvfp4"}
    assert offered(86, "dense") == {"int8", "int4"}


def test_a_gpu_older_than_the_kernels_is_planned_with_all_experts_computing() -> None:
    options = PlanOptions(target="rtx", dtype="float16", max_batch=1)
    gpus = [GpuModel(f"SM {sm}", 10**12, sm, 10**12) for sm in (89, 75)]
    new, old = fit(PUBLISHED, options, gpus)
    assert new.fits and old.fits
    assert (old.step_seconds or 0) > 9 * (new.step_seconds or 0) > 0
    assert old.fullest.scratch > 4 * new.fullest.scratch
    _, refused = fit(PUBLISHED, replace(options, expert_path="kernels"), gpus)
    assert not refused.fits
    assert "SM 75" in refused.refused


@given(memory=st.integers(126 * 10**9, 150 * 10**9))
def test_largest_is_largest(memory: int) -> None:
    def needs(options: PlanOptions) -> int:
        return device_needs(PUBLISHED, options)[0].total

    asked = replace(TRT, max_batch=16)
    rows = largest_batch(PUBLISHED, asked, memory)
    assert rows == 0 or needs(replace(asked, max_batch=rows)) <= memory
    assert rows == 16 or needs(replace(asked, max_batch=rows + 1)) > memory
    long = replace(TRT, max_batch=1, max_context=100_000)
    context = largest_context(PUBLISHED, long, memory)
    assert context == 0 or needs(replace(long, max_context=context)) <= memory
    assert context in (0, 100_000) or needs(replace(long, max_context=context + 64)) > memory


def test_time_is_that_of_the_slower_of_memory_and_matrix_units() -> None:
    for f in fit(PUBLISHED, TRT, GPUS):
        assert f.pass_seconds is not None
        assert 62e9 / f.gpu.bandwidth < f.pass_seconds < 65e9 / f.gpu.bandwidth
        assert f.by_arithmetic == ()
    many = replace(TRT, max_batch=32, expert_path="dense")
    for f in fit(PUBLISHED, many, GPUS):
        assert f.by_arithmetic[0] == "pass", "32 rows let 128 experts compute 512 tokens"
        assert (f.pass_seconds or 0) * f.gpu.flops == pytest.approx(
            2 * 512 * (29.37e9 + 1.84e9), rel=0.01
        )
    (unknown,) = fit(PUBLISHED, TRT, [GpuModel("some", 10**12, 90)])
    assert (unknown.pass_seconds, unknown.break_even) == (None, {})
    (ar,) = fit(PUBLISHED, replace(TRT, mode="ar"), [GPUS[0]])
    assert (ar.pass_seconds, ar.break_even) == (None, {})
    assert ar.step_seconds is not None


def test_gpus_go_by_names_people_type() -> None:
    assert gpus_named("all") == GPUS
    assert [g.title for g in gpus_named("rtx4090")] == ["RTX 4090"]
    assert [g.title for g in gpus_named("2x h100")] == ["2x H100 80GB"]
    assert gpus_named("RTX PRO 6000")[0].memory == 96 * 10**9
    for name in ("GTX 480", "RTX", ""):
        with pytest.raises(ConfigError) as caught:
            gpus_named(name)
        assert all(gpu.name in caught.value.found for gpu in GPUS)


def test_a_gpu_at_hand_has_its_own_memory_and_the_table_s_bandwidth() -> None:
    gpus = [Gpu("NVIDIA GeForce RTX 4090", 89, 25_386_352_640)] * 2
    gpus.append(Gpu("NVIDIA H100 PCIe", 90, 85 * 10**9))
    gpus.append(Gpu("NVIDIA GeForce RTX 4090 Laptop GPU", 89, 16 * 10**9))
    known, *others = gpu_at_hand(gpus)
    assert (known.memory, known.bandwidth, known.flops) == (25_386_352_640, 1008 * 10**9, 165.2e12)
    assert known.link == 32 * 10**9
    assert [gpu.bandwidth + gpu.link for gpu in others] == [0, 0], "other cards than the table's"


SMALL = of_layers("M*" * 20)


def fullest(options: PlanOptions) -> int:
    return max(d.total for d in device_needs(SMALL, options))


def test_a_plan_fits_memory_that_is_just_enough() -> None:
    options = replace(TRT, devices=3)
    needs = [d.total for d in device_needs(SMALL, options)]
    assert min(needs) < max(needs)
    for short in (0, 1):
        (found,) = fit(SMALL, options, [GpuModel("some", max(needs) - short, 89, 10**12)])
        assert (found.fits, found.fullest.total) == (not short, max(needs))


def test_rows_and_texts_are_as_many_and_as_long_as_just_fit() -> None:
    most = replace(TRT, max_batch=8)
    for rows in range(1, 9):
        needs = fullest(replace(TRT, max_batch=rows))
        assert [largest_batch(SMALL, most, needs - short) for short in (0, 1)] == [rows, rows - 1]
    assert largest_batch(SMALL, most, 10**13) == 8
    long = replace(TRT, max_batch=1, max_context=100_000)
    for context in (256, 320, 4096):  # as long as their cache
        needs = fullest(replace(long, max_context=context))
        less = context - 64 if context > 256 else 0
        assert [largest_context(SMALL, long, needs - short) for short in (0, 1)] == [context, less]
    assert largest_context(SMALL, TRT, 10**13) == 4096, "what is planned without a word"
    assert largest_context(replace(SMALL, max_position_embeddings=1000), TRT, 10**13) == 1000


def offered(config: ModelConfig, options: PlanOptions, memory: int) -> dict[str, bool]:
    """Flags of every alternative, and whether they suffice."""
    (found,) = fit(config, options, [GpuModel("some", memory, 89, 10**12)])
    return {a.flags: a.fits for a in found.alternatives}


def test_alternatives_are_the_mildest_changes_that_suffice_and_what_does_not() -> None:
    formats = {"int8", "fp8", "int4", "nvfp4"}
    alone = {f"--experts {name}": False for name in formats}
    others = ("--devices 2", "--mode ar")
    both = {f"{experts} {more}": True for experts in alone for more in others}
    some = {**alone, **dict.fromkeys(others, False), **both}
    assert offered(PUBLISHED, TRT, 40 * 10**9) == some
    assert offered(PUBLISHED, TRT, 96 * 10**9) == dict.fromkeys((*alone, *others), True)
    half = "--dtype bfloat16"
    halved = {half, *(f"{half} {more}" for more in (*alone, "--devices 2", "--mode ar"))}
    found = offered(PUBLISHED, replace(TRT, dtype="float32"), 40 * 10**9)
    assert found.keys() >= {*halved, "--devices 2", "--mode ar"}
    for dtype in (None, "float32"):
        cpu = PlanOptions(target="ort-cpu", dtype=dtype)
        assert offered(PUBLISHED, cpu, 40 * 10**9) == {"--mode ar": False}
    assert offered(SMALL, TRT, 10**9) == {"--devices 2": False, "--mode ar": False}
    spread = offered(PUBLISHED, replace(TRT, devices=2), 30 * 10**9)
    assert not [flags for flags in spread if "--devices" in flags]


def test_what_is_just_enough_for_a_change_suffices() -> None:
    few = fullest(replace(TRT, mode="ar"))
    assert offered(SMALL, TRT, few)["--mode ar"]
    assert "--mode ar" not in offered(SMALL, TRT, few - 1), "with fewer rows"
    single = fullest(replace(TRT, max_batch=1, max_context=2048))
    long = replace(TRT, max_context=100_000)
    assert offered(SMALL, long, single)["--max-batch 1 --max-context 2048"]


def test_the_slower_way_to_load_counts() -> None:
    assert LoadTime(10, 2).seconds == LoadTime(2, 10).seconds == 10
    assert [LoadTime(10, 2).bound, LoadTime(2, 10).bound] == ["disk", "PCIe"]
    assert (LoadTime(2, 2).bound, LoadTime(0.5, None).bound) == ("disk", "disk")
    assert LoadTime(0.5, None).seconds == 0.5
    (found,) = fit(SMALL, replace(TRT, disk_rate=10), [GpuModel("no link known", 10**12, 89)])
    assert found.load is not None
    assert (found.load.link, found.load.bound) == (None, "disk")
    (found,) = fit(SMALL, TRT, [gpus_named("H200")[0]])
    assert found.load is not None
    assert found.load.disk == found.fullest.weights / 3e9, "assumed"


def test_the_published_model_loads_the_weights_of_its_mode_once() -> None:
    """126.4 GB over the disk, however the layers are spread, and 64e9 bytes a second a link."""

    def load(gpu: str, **changes: Any) -> LoadTime:
        (found,) = fit(PUBLISHED, replace(TRT, **changes), gpus_named(gpu))
        assert found.load is not None
        return found.load

    one, two = load("H100"), load("2x H100")
    assert one.seconds == pytest.approx(126.4e9 / ASSUMED_DISK_RATE, rel=1e-3)
    assert one.disk == two.disk == load("3x H100").disk
    assert two.link == pytest.approx((one.link or 0) / 2, rel=0.02)
    fast = load("H200", disk_rate=10**12)
    assert (fast.bound, fast.seconds) == ("PCIe", pytest.approx(126.4e9 / 64e9, rel=1e-3))
    assert load("H200", mode="ar").disk == pytest.approx(63.2e9 / 3e9, rel=1e-2)
    assert load("H200", experts="int4").disk < 0.4 * one.disk


def test_loading_is_as_long_as_its_fullest_device_takes() -> None:
    gpu = GpuModel("some", 10**12, 89, 10**12, link=10**9)
    (found,) = fit(PUBLISHED, replace(TRT, devices=3, disk_rate=10**12), [gpu])
    weights = [d.weights for d in found.devices]
    assert max(weights) > 1.5 * min(weights)
    assert found.load == LoadTime(sum(weights) / 10**12, max(weights) / gpu.link)
    assert found.to_json()["load"]["seconds"] == found.load.seconds
    (mapped,) = fit(PUBLISHED, PlanOptions(target="ort-cpu"), [gpu])
    assert (mapped.load, mapped.to_json()["load"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "sm", "says"),
    [
        (PlanOptions(target="rtx", dtype="bfloat16"), 75, "float16 only"),
        (PlanOptions(target="rtx", dtype="float16"), 75, ""),
        (PlanOptions(target="trt", dtype="bfloat16"), 75, ""),
        (PlanOptions(target="rtx", sms=(89,)), 120, "--sm does not list SM 120"),
        (PlanOptions(target="rtx", sms=(89, 120)), 120, ""),
    ],
)
def test_a_gpu_is_refused_for_its_hardware_or_what_is_built_for(
    options: PlanOptions, sm: int, says: str
) -> None:
    (found,) = fit(SMALL, options, [GpuModel("some", 10**12, sm, 10**12)])
    assert says in found.refused if says else not found.refused
    assert found.fits == (not says)
