"""What a run says at its end, of a small suite: in one process, and in workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.source import ROOT

CONFTEST = """
from tests.helpers.account import Account
def pytest_addoption(parser): parser.addoption("--cpu-limit", type=float)
def pytest_configure(config): config.pluginmanager.register(Account(config))
"""
TESTS = """
import pytest, subprocess, sys, time
BUSY = "import time\\nwhile time.process_time() < 0.4: pass"
@pytest.mark.wheel
def test_of_the_wheel(): ...
@pytest.mark.gpu
@pytest.mark.slow
def test_of_a_gpu(): ...
def test_skipped(): pytest.skip("there is no moon")
def test_waits(): time.sleep(0.4)
def test_works(): subprocess.run([sys.executable, "-c", BUSY])
@pytest.mark.slow
def test_works_and_says_so(): subprocess.run([sys.executable, "-c", BUSY])
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_did_not_run_and_what_takes_long_are_told(tmp_path: Path, workers: str) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(TESTS)
    words = ["-m not wheel and not gpu", "--cpu-limit=0.3", "-p no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-n", workers, *words, str(tmp_path)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment = {**clean, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    told = [" ".join(line.split()).strip("= ") for line in done.stdout.splitlines()]
    at = told.index("3 tests did not run")
    assert sorted(told[at + 1 : at + 4]) == [
        "1 make test-gpu",
        "1 make test-wheel",
        "1 skipped: there is no moon",
    ]
    assert told[at + 4].startswith("without the mark `slow`")
    assert told[at + 5].endswith("test_some.py::test_works")
    assert "3 passed, 1 skipped" in told[-1]
