"""Sections `full-denoiser` and `full-context`: passes of the published model with random weights.

The engines are programs without weights, built before, with the expert kernels between them as a
build without a word has it; without a pack dense engines are asked as well. Weights are drawn in
device memory. Passes are the runtime's own, at 1 and 8 rows, replayed as a graph and launched piece
by piece.
"""

from __future__ import annotations

import json
import os
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cuda.bindings import driver as cuda_driver
from cuda.bindings import runtime as cudart

from tools.gpu.counted import CountedCuda
from tools.gpu.kernel_profile import profiled
from tools.gpu.one_tower import OneTower
from tools.gpu.passes import ROWS, WARM, capacity_of, passes
from tools.gpu.questions import Given
from tools.gpu.rtx_setup import set_up_rtx
from tools.gpu.unpack import unpack
from twotower.builders.base import DENSE
from twotower.bundle import Bundle
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.cli.main import main as twotower
from twotower.doctor import Answers
from twotower.doctor.sections import short
from twotower.hardware import ANY_SM
from twotower.runtime.device import Event
from twotower.runtime.workspace import Workspace
from twotower.tensorrt_library import variant_from_module

__all__ = ["ARCHIVE", "FOLDER", "ask", "build_full_size", "measure_tower"]

ARCHIVE, FOLDER = "full-size.tar.xz", "full-size"
_LEAST, _MOST, _SECONDS = 3, 50, 2.0
"""Runs that are counted, of each pass."""

_HEAD = (
    *("experts", "pass", "rows", "how", "ms", "ms one after another"),
    *("GB/s of all weights", "graphs made"),
)
_LEAST_TIME = 60.0
"""Seconds that dense engines take at least, their build included."""


def ask(answers: Answers, given: Given) -> None:
    graph = given.name.removeprefix("full-")
    words = set_up_rtx(given)
    import tensorrt_rtx as trt

    answers.put(library=trt.__version__, built_for=os.environ.get(ANY_SM) or "this GPU")
    cuda = CountedCuda(cudart, driver=cuda_driver)
    cuda.device_count()
    variant = variant_from_module(trt)
    for experts in ("", DENSE):
        if experts and (given.find(ARCHIVE) is not None or answers.left < _LEAST_TIME):
            break
        began = time.monotonic()
        bundle = _bundle(given, (*words, *(("--experts", experts) if experts else ())))
        built = time.monotonic()
        tower = OneTower(bundle, graph, variant, cuda)
        facts = {
            "build_seconds": short(built - began),
            "ready_seconds": short(time.monotonic() - built),
            "weight_gb": short(tower.weights.nbytes / 1e9),
            "free_gb": short(cuda.free_memory()[0] / 1e9),
        }
        answers.put(**{f"experts {tower.computed_by}": facts})
        measure_tower(answers, tower, graph, cuda)
        tower.close()


def measure_tower(answers: Answers, tower: OneTower, graph: str, cuda: CountedCuda) -> None:
    """Times a tower's passes, replayed and launched, and says which kernels they are made of.

    Args:
        answers: Gets the numbers, and a table of passes.
        tower: The tower.
        graph: Which it is.
        cuda: The calls it was made with.
    """
    rows_of_table: list[tuple[Any, ...]] = [*map(tuple, answers.get("rows", []))]
    first = len(rows_of_table)
    for graphs in (True, False):
        towers = tower.towers(graphs=graphs)
        for rows in ROWS:
            work = Workspace(towers, rows=rows, capacity=capacity_of(towers))
            for one in passes(work, towers, graph):
                made = cuda.made
                ms, in_row = _times(one.run)
                rate = tower.weights.nbytes / ms / 1e6
                how = "replayed" if graphs else "launched"
                numbers = (*map(short, (ms, in_row, rate)), cuda.made - made)
                rows_of_table.append((tower.computed_by, one.name, rows, how, *numbers))
                answers.put(rows=rows_of_table)
                answers.table("Passes", _HEAD, rows_of_table)
                key = f"{tower.computed_by}, {one.name} {rows}"
                answers.put(finite={**answers.get("finite", {}), key: one.finite})
                if not graphs:
                    profiled(answers, one.run, name=f"{tower.computed_by}, {one.name}, {rows} rows")
            work.close()
        towers.close()
    experts, name, rows, how, ms, *_ = rows_of_table[first]
    weights = f"{tower.weights.nbytes / 1e9:.1f} GB of weights in all"
    answers.say(f"{name}, {rows} row, {how}, experts {experts}: {ms:g} ms; {weights}")


def build_full_size(output: Path, words: Sequence[str]) -> Bundle:
    """The published model's graphs in bfloat16 and their engines, without weights.

    Args:
        output: The bundle. One that is there is taken, with its engines if they fit; the config
            of a new one is written beside it.
        words: More words for `twotower build`.

    Raises:
        RuntimeError: they could not be built; the reason is in the log.
    """
    made: list[str] = []
    if not output.is_dir():
        config = output.with_suffix(".config.json")
        config.write_text(json.dumps(PUBLISHED_CONFIG), encoding="utf-8")
        made = ["--from-config", str(config), "--dtype", "bfloat16"]
    options = ["--target", "rtx", "--max-batch", str(max(ROWS)), "--no-cache"]
    if twotower(["build", str(output), *made, *options, *words]):
        raise RuntimeError("the published model could not be built for rtx")
    return Bundle.open(output)


def _bundle(given: Given, words: Sequence[str]) -> Bundle:
    """Of the pack if its engines fit, else built here; one for both sections."""
    archive, folder = given.find(ARCHIVE), given.work / FOLDER
    if archive is not None and not folder.is_dir():
        with tarfile.open(archive) as packed:
            unpack(packed, given.work)
    return build_full_size(folder, words)


def _times(run: Callable[[], Event]) -> tuple[float, float]:
    """Milliseconds of a pass: the median of those that are waited for, and of several in a row."""
    for _ in range(WARM):
        run().wait_done()
    times: list[float] = []
    end = time.monotonic() + _SECONDS
    while len(times) < _MOST and (len(times) < _LEAST or time.monotonic() < end):
        began = time.perf_counter()
        run().wait_done()
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in times:
        event = run()
    event.wait_done()
    return 1000 * median(times), 1000 * (time.perf_counter() - began) / len(times)
