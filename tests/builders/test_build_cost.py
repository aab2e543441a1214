"""A build that the kernel would kill is refused before it starts."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.errors import fails
from tests.helpers.trt.install import L4, machine_with
from twotower.builders import BuildConfig, EngineBuilder, build_engines
from twotower.builders.build_cost import LayerBytes, build_memory, require_build_memory
from twotower.builders.trt import make_engine, tensorrt_builder
from twotower.builders.trt.cut import cut_layers, least_bound
from twotower.bundle import Bundle, engine_folder
from twotower.cli.options import byte_size
from twotower.errors import BuildError
from twotower.units import format_bytes

GB = 10**9
HELD = LayerBytes((2 * GB, GB, 2 * GB), GB // 2, 0)
NEEDED = {"context.engine": build_memory(HELD.total, 3), "denoiser.engine": build_memory(GB, 3)}
LEAST = least_bound(HELD)


def test_a_build_that_fits_or_is_bounded_or_unknown_goes_on() -> None:
    most = max(NEEDED.values())
    require_build_memory(NEEDED, least=LEAST, available=most, bound=None)
    require_build_memory(NEEDED, least=LEAST, available=most - 1, bound=10 * GB)
    require_build_memory(NEEDED, least=LEAST, available=0, bound=None)
    require_build_memory({}, least=LEAST, available=1, bound=None)


@given(available=st.integers(GB, 40 * GB))
def test_what_it_says_to_type_can_be_built(available: int) -> None:
    if available >= NEEDED["context.engine"]:
        return require_build_memory(NEEDED, least=LEAST, available=available, bound=None)
    with fails(
        BuildError, what="context.engine", found=f"{format_bytes(NEEDED['context.engine'])} needed"
    ) as caught:
        require_build_memory(NEEDED, least=LEAST, available=available, bound=None)
    bound = byte_size(
        caught.value.do.split("--max-build-memory ")[1].split("G")[0] + "G", "--max-build-memory"
    )
    assert bound is not None
    assert cut_layers(HELD, bound)
    if available - GB // 10 >= LEAST:
        assert bound <= available
    return None


def test_a_build_asks_before_it_starts_and_engines_of_the_cache_need_no_memory(
    bundle: Bundle, builder: EngineBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BuildConfig(max_context=256, experts="dense")
    build_engines(bundle, "trt", builder, config=config)
    shutil.rmtree(engine_folder(bundle, "trt"))
    small = replace(machine_with(L4), available=10**7)
    monkeypatch.setattr(tensorrt_builder, "probe_machine", lambda: small)
    monkeypatch.setattr(make_engine, "run_job", lambda *_, **__: pytest.fail("a build was started"))
    record = build_engines(bundle, "trt", builder, config=config)
    assert all(facts["cached"] for facts in record.report["engines"].values())
    with fails(BuildError, "does not fit this machine", found="available"):
        build_engines(bundle, "trt", builder, config=replace(config, force=True))
