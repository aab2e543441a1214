"""What a run says at its end: tests that did not run, and tests that lack the mark `slow`.

Time is that of processors, of the test's process and of those it waited for: other programs on the
machine lengthen it little. What a fixture shared by several tests takes is nobody's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

__all__ = ["Account"]

RUN_BY = {
    "wheel": "make test-wheel",
    "kernels": "make kernels",
    "browser": "make test-browser",
    "trained": "make test-trained",
    "gpu": "make test-gpu",
    "trt_rtx": "make test-engines",
    "slow": "make test",
}
"""Mark -> the target that runs the tests it leaves out of others, the first that a test has."""

_MAY_TAKE_LONG = ("slow", "trained", "browser", "wheel", "kernels")
_SECONDS = "processor seconds"


def _now() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_by(marks: set[str]) -> str:
    """What runs a test that was left out."""
    return next(
        (target for mark, target in RUN_BY.items() if mark in marks),
        "left out by -k, -m or --deselect",
    )


class Account:
    """A plugin of one process: pytest's own, or one of pytest-xdist.

    Args:
        config: Of the run.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._limit: float | None = config.getoption("--cpu-limit")
        self._left_out: Counter[str] = Counter()
        self._too_long: list[str] = []

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._left_out.update(run_by({mark.name for mark in item.iter_markers()}) for item in items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        before = _now()
        try:
            return (yield)
        finally:
            if not any(map(item.get_closest_marker, _MAY_TAKE_LONG)):
                item.user_properties.append((_SECONDS, _now() - before))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = dict(report.user_properties).get(_SECONDS, 0)
        if report.when == "teardown" and self._limit and seconds > self._limit:
            self._too_long.append(f"{seconds:6.1f} s  {report.nodeid}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker hands on what it left out; a run with tests that are too long has failed."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["left_out"] = dict(self._left_out)
        elif self._too_long and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Every worker leaves out the same."""
        self._left_out = Counter(getattr(node, "workeroutput", {}).get("left_out", self._left_out))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        skipped = Counter(
            str(report.longrepr[2]).removeprefix("Skipped: ")
            for report in terminalreporter.stats.get("skipped", ())
        )
        if total := self._left_out.total() + skipped.total():
            terminalreporter.section(f"{total} tests did not run")
            for what, count in [
                *self._left_out.most_common(),
                *((f"skipped: {why}", n) for why, n in skipped.most_common()),
            ]:
                terminalreporter.line(f"{count:6d}  {what}")
        if self._too_long:
            terminalreporter.section(
                f"without the mark `slow`, and longer than {self._limit:g} s of a processor"
            )
            for line in sorted(self._too_long, reverse=True):
                terminalreporter.line(line)
