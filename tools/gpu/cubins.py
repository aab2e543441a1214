"""Section `cubins`: a kernel compiled elsewhere, by the driver's API alone, in a graph too.

It decides whether the runtime can bring kernels of its own as files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from cuda.bindings import driver as cuda_driver
from cuda.bindings import runtime as cuda_runtime

from tools.gpu.driver import Driver, Kernel
from tools.gpu.questions import Given
from twotower.doctor import Answers, SkipSectionError
from twotower.doctor.sections import short

__all__ = ["ask", "bfloat16_bits", "expected_product"]

FOLDER, LIST_FILE = "cubins", "kernels.json"
WIDTH, DEPTH, ROWS, COLUMNS = 1856, 2688, 16, 64  # of tools.gpu.kernels, which imports Triton
BLOCKS, WEIGHTS = 6, 8

_TOLERANCE = 1e-3
"""Relative to the norm: operands are exact, sums are in float32 in another order."""


def ask(answers: Answers, given: Given) -> None:
    driver = Driver(cuda_driver, cuda_runtime)
    sm = driver.compute_capability()
    folder, facts = _cubin(answers, given, sm)
    kernel = Kernel(driver, folder / facts["file"], facts)
    answers.put(sm=sm, loaded_by=kernel.loaded_by, triton=facts["triton"])
    rng = np.random.default_rng(0)
    x, x_bits = bfloat16_bits(rng.standard_normal((BLOCKS, ROWS, DEPTH), np.float32))
    weights, bits = bfloat16_bits(0.02 * rng.standard_normal((WEIGHTS, WIDTH, DEPTH), np.float32))
    first, second = (rng.permutation(WEIGHTS)[:BLOCKS].astype(np.int32) for _ in range(2))
    out = np.full((BLOCKS, ROWS, WIDTH), np.nan, np.float32)
    at = [driver.upload(array) for array in (x_bits, bits, first, out)]
    launch = kernel.bind((WIDTH // COLUMNS, BLOCKS, 1), at)
    stream = driver.stream()

    def error(chosen: np.ndarray) -> float:
        """Of what is in device memory once the stream is done; the memory is poisoned after."""
        driver.synchronize(stream)
        driver.download(out, at[3])
        driver.upload(np.full_like(out, np.nan), at[3])
        wanted = expected_product(x, weights, chosen)
        return float(np.linalg.norm(out - wanted) / np.linalg.norm(wanted))

    launch(stream)
    _put(answers, "a launch", error(first))
    graph = driver.captured(stream, lambda: launch(stream))
    driver.call("cudaGraphLaunch", graph, stream)
    _put(answers, "a replayed graph", error(first))
    driver.upload(second, at[2])
    driver.call("cudaGraphLaunch", graph, stream)
    _put(answers, "a replayed graph with another list", error(second))
    launch_us = _host_us(driver, stream, lambda: launch(stream))
    graph_us = _host_us(driver, stream, lambda: driver.call("cudaGraphLaunch", graph, stream))
    answers.put(launch_us_on_the_host=launch_us, graph_launch_us_on_the_host=graph_us)
    answers.say(f"{launch_us:g} us a launch on the host, {graph_us:g} us a launch of a graph")


def bfloat16_bits(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 array cut to bfloat16: its value in float32, and its bits."""
    bits = (array.view(np.uint32) >> 16).astype(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32), bits


def expected_product(x: np.ndarray, weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What the kernel computes, in float32."""
    blocks = [np.maximum(block @ weights[w].T, 0) ** 2 for block, w in zip(x, chosen, strict=True)]
    return np.stack(blocks)


def _put(answers: Answers, what: str, error: float) -> None:
    right = error < _TOLERANCE  # False for NaN
    rows = [*answers.get("rows", []), [what, right, f"{error:.2e}"]]
    answers.put(rows=rows)
    answers.table("Against float32", ("", "right", "relative error"), rows)


def _cubin(answers: Answers, given: Given, sm: int) -> tuple[Path, dict[str, Any]]:
    """The cubin for this GPU and its facts: brought, or compiled here in a process of its own."""
    folder = given.find(FOLDER)
    listed = json.loads((folder / LIST_FILE).read_text(encoding="utf-8")) if folder else []
    facts = next((row for row in listed if row["sm"] == sm), None)
    if folder is not None and facts is not None:
        answers.put(compiled="elsewhere")
        return folder, facts
    folder = given.work / FOLDER
    _compiled_here(folder, sm)
    answers.put(compiled=f"here: none was brought for SM {sm}")
    (facts,) = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))
    return folder, facts


def _compiled_here(folder: Path, sm: int) -> None:
    command = [sys.executable, "-m", "tools.gpu.kernels", str(folder), str(sm)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise SkipSectionError(f"no cubin was brought for SM {sm} and none could be made: {said}")


def _host_us(driver: Driver, stream: int, launch: Callable[[], Any], *, count: int = 400) -> float:
    """Microseconds of the host a launch, the median of five rows of launches."""
    times = []
    for _ in range(5):
        driver.synchronize(stream)
        began = time.perf_counter()
        for _ in range(count):
            launch()
        times.append((time.perf_counter() - began) / count * 1e6)
    driver.synchronize(stream)
    return short(median(times))
