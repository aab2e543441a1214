"""A build that the kernel would kill is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.bundles import export_fixture
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.cut import build_memory, cut_layers, most_weights
from twotower.builders.memory import least_bound, require_build_memory
from twotower.builders.segment import GraphLayers
from twotower.bundle import engine_folder
from twotower.cli.options import byte_size
from twotower.errors import BuildError
from twotower.hardware import Machine

GB = 10**9
GRAPHS = {
    "context": GraphLayers((2 * GB, GB, 2 * GB), GB // 2, 0),
    "context_head": GraphLayers((), 0, GB),
    "denoiser": GraphLayers((), 0, GB),
}


def test_a_build_that_fits_or_is_bounded_or_unknown_goes_on() -> None:
    needed = build_memory(GRAPHS["context"].total)
    require_build_memory(GRAPHS, available=needed, bound=None)
    require_build_memory(GRAPHS, available=needed - 1, bound=10 * GB)
    require_build_memory(GRAPHS, available=0, bound=None)


@given(available=st.integers(GB, 40 * GB))
def test_what_it_says_to_type_can_be_built(available: int) -> None:
    needed = build_memory(GRAPHS["context"].total)
    if available >= needed:
        return require_build_memory(GRAPHS, available=available, bound=None)
    with pytest.raises(BuildError) as caught:
        require_build_memory(GRAPHS, available=available, bound=None)
    assert f"{needed / 1e9:.1f} GB needed" in caught.value.found
    bound = byte_size(caught.value.do.split("--max-build-memory ")[1].split("G")[0] + "G")
    assert bound is not None
    assert bound >= least_bound(GRAPHS)
    if least_bound(GRAPHS) <= available - GB // 10:
        assert bound <= available
    for graph in GRAPHS.values():
        if graph.layers:
            assert cut_layers(graph.layers, first_extra=graph.before, last_extra=graph.after, most=most_weights(bound))
    return None


@pytest.mark.trt_rtx
def test_a_build_asks_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export_fixture("hybrid-b", tmp_path / "bundle", "float16")
    monkeypatch.setattr("twotower.builders.tensorrt_builder.probe_machine", lambda: Machine("test", 2, GB, (), {}, available=10**7))
    monkeypatch.setattr("twotower.builders.make_engine.run_job", lambda *_, **__: pytest.fail("a build was started"))
    with pytest.raises(BuildError) as caught:
        build_engines(bundle, "rtx", builder_for("rtx"), config=BuildConfig(sms=(89,), max_context=256))
    assert "available" in caught.value.found
    assert not engine_folder(bundle, "rtx").exists()
