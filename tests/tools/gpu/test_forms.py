"""Both forms of engines side by side, with torch as the engine: what differs is found."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.small_slice import SMALL_SLICE
from tools.gpu import form_pair, forms, passes
from tools.gpu.form_pair import Difference
from tools.gpu.forms import FORMS
from tools.gpu.questions import Given
from tools.gpu.torch_engine import TorchTensorRT, torch_job
from twotower.builders.trt import make_engine
from twotower.bundle import Bundle
from twotower.doctor import Answers, SkipSectionError

SMALL = {**SMALL_SLICE, "max_position_embeddings": 512}
PASSES = ("prefill", "block", "decode", "head", "denoise")
ROWS = (1, 2)
ORDER = [(name, rows, how) for how in ("replayed", "launched") for rows in ROWS for name in PASSES]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The fake for CUDA; under it the section builds with torch, small."""
    api = FakeCuda()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", TorchTensorRT("cpu", api))
    monkeypatch.setattr(make_engine, "run_job", torch_job)
    monkeypatch.setattr(forms, "set_up_rtx", lambda given: ("--sm", "89"))
    monkeypatch.setattr(forms, "cudart", api)
    monkeypatch.setattr(forms, "SLICE", "ME*")
    monkeypatch.setattr(forms, "CHANGES", SMALL)
    monkeypatch.setattr(forms, "ROWS", ROWS)
    monkeypatch.setattr(form_pair, "_SECONDS", 0.0)
    monkeypatch.setattr(form_pair, "_LEAST", 2)
    monkeypatch.setattr(passes, "TOKENS", 100)
    monkeypatch.setattr(passes, "WIDTHS", {"prefill": 40, "block": 16, "decode": 1})
    return api


def ask(work: Path) -> Answers:
    answers = Answers(work / "answers.json", 600)
    forms.ask(answers, Given(name="forms", pack=(), work=work))
    return answers


def table(answers: Answers, title: str) -> list[list[Any]]:
    found = next(t for t in answers["tables"] if t["title"].startswith(title))
    return list(found["rows"])


@pytest.mark.slow
def test_both_forms_are_built_run_and_found_equal(api: FakeCuda, tmp_path: Path) -> None:
    answers = ask(tmp_path)
    assert not api.leaked
    builds = table(answers, "Builds")
    assert [row[0] for row in builds] == list(FORMS)
    weights = Bundle.open(tmp_path / "forms" / "inputs").data_file("denoiser").stat().st_size / 1e6
    assert builds[1][2] - builds[0][2] > weights, "the second form holds the weights"
    rows = table(answers, "Passes")
    assert [tuple(row[:3]) for row in rows] == ORDER
    for row in rows:
        assert row[3] > 0 and row[4] > 0
        assert row[5] == pytest.approx(row[3] / row[4], rel=0.01)
        assert row[6] == "equal"
    assert answers["equal"] is True
    assert len(answers["passes"]) == len(ORDER)
    memory = [" ".join(row[:3]) for row in table(answers, "Memory")]
    assert memory[:2] == ["inputs replayed first", "inside replayed second"]
    assert memory[2:] == ["inputs launched second", "inside launched first"]
    assert "the same to the bit in 20 of 20 passes" in answers["summary"][0]


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["denoiser", "context"])
def test_a_weight_that_differs_is_found(
    api: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    """One number of the last norm before the results is another in the engines that hold it."""
    monkeypatch.setattr(forms, "ROWS", (1,))
    monkeypatch.setattr(make_engine, "run_job", lambda *a, **k: planted_job(graph, *a, **k))
    answers = ask(tmp_path)
    found = {row[0]: row[6] for row in table(answers, "Passes") if row[2] == "replayed"}
    if graph == "denoiser":
        assert " differ, " in found.pop("denoise")
        apart = answers["passes"]["denoise, 1 rows, replayed"]["apart"]
        assert apart["confidence"][0] > 0
        assert not set(apart) - {"confidence", "predicted", "next_block"}, "the state is only read"
    else:
        for name in ("prefill", "block", "decode"):
            assert found.pop(name).startswith("1 differ, hidden by ")
    assert set(found.values()) == {"equal"}, "each pass starts from the same state in both forms"
    assert answers["equal"] is False


def planted_job(graph: str, job: dict[str, Any], scratch: Path, *, tick: Any) -> dict[str, Any]:
    """`torch_job`, which doubles one number inside the engine of a graph."""
    import onnx

    done = torch_job(job, scratch, tick=tick)
    output = Path(job["output"])
    if output.name == f"{graph}.engine":
        header, _, data = output.read_bytes().partition(b"\n")
        model = onnx.load_from_string(data)
        norms = [t for t in model.graph.initializer if t.name.endswith("norm_f.weight")]
        if norms:  # none where weights are inputs
            bits = np.frombuffer(norms[0].raw_data, np.uint16).copy()
            bits[3] += 1 << 7  # bfloat16: twice as large
            norms[0].raw_data = bits.tobytes()
            output.write_bytes(header + b"\n" + model.SerializeToString())
    return done


def test_what_differs_most_is_named() -> None:
    assert str(Difference({}, finite=True)) == "equal"
    assert str(Difference({}, finite=False)) == "equal; not all finite"
    apart = {"hidden": (0.25, 4.0), "confidence": (0.5, 1.0)}
    assert str(Difference(apart, finite=True)) == "2 differ, confidence by 0.5 of 1"
    bits = np.array([0x3F80, 0xC000, 0x7F80], np.uint16)  # 1, -2, infinity
    numbers = form_pair._numbers(bits.view(np.uint8), "bfloat16")
    np.testing.assert_array_equal(numbers, [1, -2, np.inf])


def test_forms_take_turns_and_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_pair, "_SECONDS", 0.0)
    monkeypatch.setattr(form_pair, "_LEAST", 3)
    ran: list[str] = []
    event = SimpleNamespace(wait_done=lambda: None)

    def run(name: str) -> Any:
        return lambda: ran.append(name) or event

    first, second = form_pair.in_turns([run("a"), run("b")])
    assert "".join(ran) == "abbaab"
    assert first[0] <= first[1] <= first[2]
    assert len(second) == 3


def test_without_what_exports_the_reason_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "set_up_rtx", lambda given: ())
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(SkipSectionError, match=r"nothing can be exported here: .*onnx_ir"):
        ask(tmp_path)
