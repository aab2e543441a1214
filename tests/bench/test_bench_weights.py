"""`make bench-weights` on a small file, and the device it measures with."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.weight_files import record_of, write_weights
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.weights.store import LoadRequest, WeightStore
from twotower.runtime.weights.transfer import Ring


def test_the_command_measures_every_kind_and_writes_its_table(
    tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tools("bench_weights")
    monkeypatch.setattr(os, "sync", lambda: None)  # other programs' writes may take long
    document = tmp_path / "page.md"
    document.write_text("before\n{}\nearlier\n{}\nafter\n".format(*bench.MARKS))
    words = ["--scratch", str(tmp_path / "scratch"), "--gigabytes", "0.02", "--runs", "2"]
    code = bench.main([*words, "--write-docs", str(document), "--json"])
    facts = json.loads(capsys.readouterr().out)
    warm = (bench.COPY, bench.COPY_MEMORY, bench.LOAD, bench.LOAD_HASHED, bench.LOAD_NEW)
    kinds = [f"warm: {kind}" for kind in warm] + [f"cold: {bench.COPY}", f"cold: {bench.LOAD}"]
    assert sorted(facts["seconds"]) == sorted(kinds)
    assert all(len(some) == 2 and min(some) > 0 for some in facts["seconds"].values())
    assert facts["peak_anonymous"] > 16 << 20, "the ring is seen"
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "earlier" not in text
    assert f"| warm | {bench.LOAD} |" in text
    medians = {kind: sum(some) / 2 for kind, some in facts["seconds"].items()}
    assert (code == 1) == any(ratio > 1.2 for ratio in bench.ratios(medians).values())
    assert not list((tmp_path / "scratch").iterdir())


def test_its_device_copies_behind_the_caller(tools: Any, tmp_path: Path) -> None:
    """Real threads read, copy and hash at once, and everything arrives."""
    path = tmp_path / "model.onnx.data"
    weights = write_weights(path, (5_000_000, 100, 3_000_000, 64))
    content = path.read_bytes()
    device = tools("host_device").HostDevice(1 << 40)
    ring = Ring(threads=3, slots=5, slot_bytes=1 << 16)
    for _ in range(10):
        store = WeightStore(Cuda(device), ring)
        store.load([LoadRequest(path, record_of(path), weights, 0)], hashed=True)
        for name, weight in weights.items():
            there = ctypes.string_at(store.address(path, name, 0), weight.nbytes)
            assert there == content[weight.offset : weight.end]
            ctypes.memset(store.address(path, name, 0), 0, weight.nbytes)
        store.close()
