"""The archive is written while it grows, read back, joined with another, and made into a page."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import check_error
from twotower.doctor import Archive, device_page, merge_results, page_name, read_results, write_page
from twotower.doctor.scrub import Scrubber
from twotower.errors import ConfigError

RATES = {
    "title": "Rates",
    "head": ["", "GB/s"],
    "rows": [["a | b", 1.5], ["c", True]],
    "note": "N.",
}
OK: dict[str, Any] = {
    "question": "What is it?",
    "state": "ok",
    "seconds": 1.5,
    "answers": {
        "facts": {"GPUs": "NVIDIA Thing, SM 90, 80 GiB", "driver": "580.1"},
        "summary": ["copy 3000 GB/s"],
        "tables": [RATES],
    },
}
STOPPED: dict[str, Any] = {
    "question": "Does it run?",
    "state": "stopped",
    "seconds": 60.1,
    "answers": {"error": "E: one\n  found: two"},
    "last_words": ["its time was over", "Thread 0x1"],
}


def results(device: str = "NVIDIA Thing", **sections: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "made_by": "make it",
        "twotower": "1.2",
        "date": "2026-11-26",
        "device": device,
        "sections": sections,
    }


def test_an_archive_is_whole_after_every_section(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "new" / "out"
    work.mkdir()
    (work / "b.log").write_text(f"in {work}/x\n")
    (work / "b.json").write_text("{}")
    archive = Archive(out, "NVIDIA Thing", "make it", Scrubber({work: "[work]"}))
    archive.add("machine", OK)
    first = read_results(out / "results.json")
    assert first["sections"] == {"machine": OK}
    archive.add("b", {**STOPPED, "last_words": [f"at {work}/x"]})
    archive.finish(work)
    names = {"logs.tar.gz", "nvidia-thing.md", "results.json"}
    assert {f.name for f in out.iterdir()} == names
    assert read_results(out / "results.json")["sections"]["b"]["last_words"] == ["at [work]/x"]
    with tarfile.open(out / "logs.tar.gz") as logs:
        (entry,) = logs.getmembers()
        assert (entry.name, entry.uid, entry.uname, entry.mtime) == ("b.log", 0, "", 0)
        assert logs.extractfile(entry).read() == b"in [work]/x\n"  # type: ignore[union-attr]


def test_the_page_shows_what_was_found_and_what_was_not() -> None:
    page = device_page(results(machine=OK, run=STOPPED))
    assert page.startswith("# NVIDIA Thing\n\nWritten by `make it` of twotower 1.2 on 2026-11-26")
    assert "| GPUs | NVIDIA Thing, SM 90, 80 GiB |" in page
    assert "| machine | What is it? | ok | 1.5 |" in page
    assert "| run | Does it run? | **stopped** | 60.1 |" in page
    assert "- copy 3000 GB/s\n" in page
    assert "### Rates\n\n|  | GB/s |\n| --- | --- |\n| a \\| b | 1.5 |\n| c | yes |\n\nN.\n" in page
    assert "- stopped: E: one found: two\n" in page
    assert "```text\nits time was over\nThread 0x1\n```" in page


def test_a_page_is_named_after_its_device() -> None:
    assert page_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.md"
    assert page_name("Some | CPU (R) 9000") == "some-cpu-r-9000.md"


def test_two_runs_on_a_device_make_one_page(tmp_path: Path) -> None:
    not_asked = {"question": "?", "state": "not asked", "seconds": 0, "answers": {}}
    later = {**OK, "seconds": 9.0}
    first = results(a=OK, b=STOPPED, c=OK)
    both = merge_results([first, results(a=not_asked, b=later, d=OK)])
    seconds = {name: s["seconds"] for name, s in both["sections"].items()}
    assert seconds == {"a": 1.5, "b": 9.0, "c": 1.5, "d": 1.5}
    assert write_page(tmp_path, both) == tmp_path / "nvidia-thing.md"


def test_results_of_two_devices_are_not_joined() -> None:
    with pytest.raises(ConfigError) as caught:
        merge_results([results("A"), results("B")])
    check_error(str(caught.value), "different devices")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 2, "sections": {}}', '{"schema": 1}'])
def test_what_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_results(file)
    check_error(str(caught.value), str(file))


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        Archive(tmp_path / "file", "D", "make it").add("machine", OK)
    check_error(str(caught.value), "cannot write")
