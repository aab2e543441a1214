"""bfloat16 on the device path: the text of a CPU that rounds every result alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.goldens import AR, check_golden, golden_cases
from tests.helpers.source import ROOT
from tests.helpers.towers import golden_config
from tools.half_precision import RoundingBuilder
from twotower.builders import build_engines
from twotower.evaluate.suite import judge, load_suite
from twotower.runtime import Request, TwoTower
from twotower.runtime.cuda.device_memory import DeviceBuffer

TINY = ROOT / "assets" / "twotower-tiny"
LAYOUTS = {
    "one device": {"devices": (0,)},
    "plain launches in random order": {"devices": (0,), "graphs": False, "seed": 1},
    "two devices": {"devices": (0, 1), "seed": 2},
}


def requests(folder: str) -> list[Request]:
    cases = golden_cases(folder)
    return [Request(c["prompt"], golden_config(c)) for c in cases] + [
        Request(c["prompt"], AR) for c in cases
    ]


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[int, ...]]]:
    """The host's path with engines that round every result: other memory, the same arithmetic."""
    texts: dict[str, list[tuple[int, ...]]] = {}

    def texts_of(folder: str) -> list[tuple[int, ...]]:
        if folder not in texts:
            path = tmp_path_factory.mktemp("cpu") / folder
            bundle = export_fixture(folder, path, "bfloat16")
            build_engines(bundle, "ort-cpu", RoundingBuilder())
            with TwoTower.open(path, target="ort-cpu") as model:
                texts[folder] = [out.tokens for out in model.generate(requests(folder))]
        return texts[folder]

    return texts_of


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("folder", "pieces"),
    [("hybrid-a", 1), ("hybrid-a", 4), pytest.param("hybrid-b", 1, marks=pytest.mark.slow)],
)
def test_the_text_is_that_of_a_cpu(
    opened: Any, on_a_cpu: Any, folder: str, pieces: int, layout: str
) -> None:
    with opened(folder, pieces, dtype="bfloat16", **LAYOUTS[layout]) as it:
        assert [out.tokens for out in it.model.generate(requests(folder))] == on_a_cpu(folder)


@pytest.mark.trained
@pytest.mark.parametrize("experts", ["dense", "kernels"])
def test_the_trained_model_answers(built: Any, opened: Any, experts: str) -> None:
    """Exact answers measure the arithmetic from outside; one may be lost to rounding."""
    problems = load_suite().only(limit=1).problems
    bundle = built(TINY, dtype="bfloat16", experts=experts)
    with opened(bundle) as it:
        for mode in ("diffusion", "ar"):
            options = replace(bundle.defaults, mode=mode, max_new_tokens=96)
            results = it.model.generate([Request(p.prompt, options) for p in problems])
            pairs = zip(problems, results, strict=True)
            right = [judge(p, r.text or "", r.tokens).right for p, r in pairs]
            assert sum(right) >= len(problems) - 1, right


def test_a_size_that_holds_for_float32_only_is_found(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: every element takes four bytes; a bfloat16 buffer is cleared beyond its end."""
    size = property(lambda self: 8 if self.dtype == "int64" else 4)
    monkeypatch.setattr(DeviceBuffer, "itemsize", size)
    case = golden_cases("hybrid-a")[0]
    with opened(devices=(0, 1)) as it:
        check_golden(it.model, case)
    with (
        pytest.raises(AssertionError, match="lie in no allocation"),
        opened(dtype="bfloat16", devices=(0, 1)) as it,
    ):
        check_golden(it.model, case)
