"""How TensorRT for RTX is asked for on a GPU it does not list, after what `rtx` found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import rtx_setup
from tools.gpu.questions import Given
from tools.gpu.rtx_setup import built_for, running_capability, set_up_rtx
from twotower.doctor import SkipSectionError
from twotower.hardware import ANY_SM, Gpu, Machine


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    monkeypatch.setenv(ANY_SM, "")  # put back at the end
    monkeypatch.delenv(ANY_SM)
    monkeypatch.setattr(rtx_setup, "library_site", lambda given: None)
    return Given(name="full-denoiser", pack=(), work=tmp_path)


@pytest.mark.parametrize(
    ("sm", "runs", "environment", "words"),
    [
        (90, {"default": True, "CURRENT": True}, "default", ()),
        (90, {"default": False, "CURRENT": True}, "current", ()),
        (90, {"default": False, "CURRENT": False, "SM80": True}, "default", ("--sm", "80")),
        (89, {"default": False, "CURRENT": True}, None, ()),  # it is listed, and needs nothing
        (90, {"default": False, "CURRENT": False, "SM80": False}, None, None),
    ],
)
def test_what_runs_is_what_is_built(
    given: Given,
    monkeypatch: pytest.MonkeyPatch,
    sm: int,
    runs: dict[str, bool],
    environment: str | None,
    words: Any,
) -> None:
    """Where nothing runs nothing larger is asked."""
    machine = Machine("Linux", 2, 1, (Gpu("G", sm, 1),), {})
    monkeypatch.setattr(rtx_setup, "probe_machine", lambda: machine)
    (given.work / "rtx.json").write_text(json.dumps({"runs": runs}))
    if words is None:
        with pytest.raises(SkipSectionError, match="found no plan that runs"):
            set_up_rtx(given)
        return
    assert set_up_rtx(given) == words
    assert os.environ.get(ANY_SM) == environment


def test_what_was_not_asked_is_not_known(given: Given) -> None:
    assert running_capability(given) is None


def test_the_environment_is_as_before_after_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "current"):
        if before:
            monkeypatch.setenv(ANY_SM, before)
        else:
            monkeypatch.delenv(ANY_SM, raising=False)
        with built_for("default") as words:
            assert words == ()
            assert os.environ[ANY_SM] == "default"
        assert os.environ.get(ANY_SM) == before
