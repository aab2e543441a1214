"""What the tests on a GPU share: targets with marks, and why one cannot run here."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from twotower.errors import EngineMismatchError
from twotower.hardware import TARGETS, probe_machine, select_target
from twotower.runtime import TwoTower

MARK = {"ort-cuda": pytest.mark.ort_cuda, "rtx": pytest.mark.trt_rtx, "trt": pytest.mark.trt}


def targets(*names: str) -> list[Any]:
    """Parameters of a test: the targets named, or all that need a GPU."""
    return [pytest.param(t, marks=[pytest.mark.gpu, MARK[t]]) for t in names or tuple(MARK)]


def refused(target: str) -> str | None:
    """Why this machine's GPU cannot run the target although its library is here."""
    try:
        select_target(probe_machine(), TARGETS, wanted=target)
    except EngineMismatchError as e:
        return e.found
    return None


def opened(path: Any, target: str, **options: Any) -> Any:
    """An opened bundle, for a `with` statement."""
    return closing(TwoTower.open(path, target=target, **options))
