"""What a report must not tell: where things lie, who runs it, and on which machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from twotower.doctor.scrub import Scrubber


@pytest.fixture
def scrubber(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scrubber:
    monkeypatch.setattr("platform.node", lambda: "lab-box-7.example.org")
    monkeypatch.setenv("USER", "jdoe42")
    monkeypatch.setenv("HOME", str(tmp_path / "people" / "jd"))
    return Scrubber({tmp_path / "secret project": "[bundle]"})


def test_folders_have_words_in_their_place(scrubber: Scrubber, tmp_path: Path) -> None:
    text = f"{tmp_path}/people/jd/x.py, {tmp_path}/secret project/a.onnx, {sys.prefix}/lib/y.so"
    assert scrubber.text(text) == "[home]/x.py, [bundle]/a.onnx, [environment]/lib/y.so"
    assert scrubber.text("/home/somebody/z and /Users/other/z") == "[home]/z and [home]/z"


def test_people_and_machines_are_not_named(scrubber: Scrubber) -> None:
    text = "jdoe42@lab-box-7.example.org, lab-box-7: jdoe42. lab-box-77"
    assert scrubber.text(text) == "[user]@[host], [host]: [user]. lab-box-77"


def test_common_names_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "root")
    monkeypatch.setattr("platform.node", lambda: "h2")
    assert Scrubber().text("the root of 2, h2") == "the root of 2, h2"


def test_numbers_stay_and_keys_are_texts_too(scrubber: Scrubber) -> None:
    data = {"/home/abcd/f": [1, 2.5, None, True, ("jdoe42",)]}
    assert scrubber.data(data) == {"[home]/f": [1, 2.5, None, True, ["[user]"]]}
