"""A page out of what came home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import check_error
from tools.gpu import page
from twotower.doctor import Archive


def run(folder: Path, name: str, **sections: str) -> Path:
    archive = Archive(folder / name, "NVIDIA Thing", "make gpu-first-hour")
    for section, said in sections.items():
        answers: dict[str, Any] = {"summary": [said]}
        archive.add(section, {"question": "?", "state": "ok", "seconds": 1, "answers": answers})
    return folder / name / "results.json"


def test_two_runs_are_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [run(tmp_path, "1", a="first", b="second"), run(tmp_path, "2", c="third")]
    assert page.main([*map(str, files), "--pages", str(tmp_path / "pages")]) == 0
    text = (tmp_path / "pages" / "nvidia-thing.md").read_text(encoding="utf-8")
    assert all(f"- {said}\n" in text for said in ("first", "second", "third"))
    assert "nvidia-thing.md" in capsys.readouterr().out


def test_no_results_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main([str(tmp_path / "results.json"), "--pages", str(tmp_path)]) == 2
    check_error(capsys.readouterr().err, "results.json cannot be read")
    assert not list(tmp_path.iterdir())
