"""The first run on a GPU survives whatever a question does; here there is no GPU, and it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.source import ROOT


def test_every_question_has_an_answer_or_a_reason(tmp_path: Path) -> None:
    asked = ["machine", "rtx-runs", "trt-runs", "goldens-ort-cuda", "half-rtx", "real-trt"]
    done = subprocess.run(
        [sys.executable, "tools/gpu_first_run.py", "--output", str(tmp_path), "--only", ",".join(asked)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["name"] for a in answers] == asked, done.stderr
    assert answers[0]["outcome"] == "answered"
    assert answers[0]["facts"]["targets"]["ort-cpu"] == "can run here"
    for answer in answers[2:]:
        assert "skipped" in answer["facts"], answer
    page = (tmp_path / "README.md").read_text()
    assert all(f"## {a['question']}" in page for a in answers)


def test_no_question_is_begun_after_the_end(tmp_path: Path) -> None:
    words = [sys.executable, "tools/gpu_first_run.py", "--output", str(tmp_path), "--only", "machine", "--minutes", "0"]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, check=False)
    assert done.returncode == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["outcome"] == "not asked"
