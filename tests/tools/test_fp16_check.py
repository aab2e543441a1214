"""`make fp16-check` on one prompt of each kind: rounded results, and the exported graph."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.source import ROOT


@pytest.mark.slow
def test_a_few_prompts_keep_their_text() -> None:
    command = [sys.executable, "-m", "tools.fp16_check", "--limit", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for how in ("every result rounded", "the graph as exported"):
        assert sum(line.startswith(how) for line in done.stdout.splitlines()) == 2
