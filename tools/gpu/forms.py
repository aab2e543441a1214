"""Section `forms`: engines that read weights as inputs, beside engines that hold the same weights.

A slice of the published model at its widths is exported and built here in both forms, opened side
by side in one process, and every pass is run in turns: times, results and memory.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from cuda.bindings import runtime as cudart

from tools.gpu.form_pair import OpenForm, compared, in_turns
from tools.gpu.passes import ROWS
from tools.gpu.questions import Given
from tools.gpu.rtx_setup import set_up_rtx
from twotower.bundle import Bundle, load_engine_record
from twotower.cli.main import main as twotower
from twotower.doctor import Answers, SkipSectionError
from twotower.doctor.sections import short
from twotower.hardware import ANY_SM
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.tensorrt_library import Variant, variant_from_module

__all__ = ["FORMS", "ask", "build_form", "compare_forms", "write_forms"]

FORMS = ("inputs", "inside")
"""As `twotower build --weights` calls them; the default first."""

TARGET, DTYPE = "rtx", "bfloat16"
SLICE = "MEM*E"
CHANGES: dict[str, Any] = {"n_routed_experts": 16, "vocab_size": 32768}
"""Of the published config: 1.3 GB a tower, half of them experts."""

_LEAST_SECONDS = 15.0
_PASSES = "Passes, weights as inputs beside weights inside"
_HEAD = ("pass", "rows", "how", "ms, inputs", "ms, inside", "inputs / inside", "results")
_BUILD_HEAD = ("weights", "seconds to build", "MB of engines")
_MEMORY_HEAD = (
    *("weights", "how", "opened", "seconds to open", "GB when opened"),
    *("GB with all passes", "s in first runs"),
)


def ask(answers: Answers, given: Given) -> None:
    words = set_up_rtx(given)
    try:
        import_module("onnx_ir")
    except ImportError as e:
        raise SkipSectionError(f"nothing can be exported here: {e}; a new pack brings it") from e
    import tensorrt_rtx as trt

    began = time.monotonic()
    folders = write_forms(given.work / "forms")
    answers.put(
        library=trt.__version__,
        built_for=os.environ.get(ANY_SM) or "this GPU",
        layers=SLICE,
        changes=CHANGES,
        export_seconds=short(time.monotonic() - began),
    )
    rows = []
    for form, folder in folders.items():
        rows.append((form, *build_form(folder, form, words)))
        answers.table("Builds", _BUILD_HEAD, rows)
    cuda = Cuda(cudart)
    cuda.device_count()
    bundles = {form: Bundle.open(folder, contents=False) for form, folder in folders.items()}
    compare_forms(answers, bundles, variant_from_module(trt), cuda)


def write_forms(work: Path) -> dict[str, Path]:
    """A bundle for each form, of the same files: random weights, the same on every machine.

    Args:
        work: A folder to make; what is there is removed.
    """
    # Exporting needs more than running: a machine with an old pack may lack it.
    from twotower.checkpoint.synthetic import published_slice, write_checkpoint
    from twotower.export import Checkpoint, ExportConfig, export_bundle

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    checkpoint = write_checkpoint(work / "checkpoint", {**published_slice(SLICE), **CHANGES})
    first, second = (work / form for form in FORMS)
    export_bundle(Checkpoint.open(checkpoint), first, ExportConfig(dtype=DTYPE))
    shutil.rmtree(checkpoint)
    shutil.copytree(first, second)  # not by links: onnx refuses to read a file that has two names
    return dict(zip(FORMS, (first, second), strict=True))


def build_form(folder: Path, form: str, words: Sequence[str]) -> tuple[float, float]:
    """Builds the engines of a bundle in one form.

    Args:
        folder: The bundle.
        form: `inputs` or `inside`.
        words: More words for `twotower build`.

    Returns:
        Seconds, and megabytes of all engines.

    Raises:
        RuntimeError: they could not be built; the reason is in the log.
    """
    options = ["--target", TARGET, "--experts", "dense", "--weights", form]
    options += ["--max-batch", str(max(ROWS)), "--no-cache"]
    if twotower(["build", str(folder), *options, *words]):
        raise RuntimeError(f"engines with weights as {form} could not be built")
    record = load_engine_record(Bundle.open(folder, contents=False), TARGET)
    size = sum(file.size for file in record.files.values())
    return short(record.report["seconds"]), short(size / 1e6)


def compare_forms(
    answers: Answers, bundles: Mapping[str, Bundle], variant: Variant, cuda: Cuda
) -> None:
    """Times every pass in both forms and compares what it writes, replayed and launched.

    Args:
        answers: Gets the numbers, a table of passes and one of memory.
        bundles: The bundle of each form, with its engines.
        variant: The library.
        cuda: The calls.
    """
    rows: list[tuple[Any, ...]] = []
    memory: list[tuple[Any, ...]] = []
    # What a library loads once is taken by the form that is opened first: they change places.
    for how, order in (("replayed", FORMS), ("launched", FORMS[::-1])):
        if rows and answers.left < _LEAST_SECONDS:
            answers.say("stopped: no time left")
            break
        with Cleanup() as close:
            forms: dict[str, OpenForm] = {}
            for name in order:
                forms[name] = OpenForm(bundles[name], variant, cuda, graphs=how == "replayed")
                close.callback(forms[name].close)
            for count in ROWS:
                _compare_passes(answers, rows, [forms[name] for name in FORMS], (count, how))
            memory += [(name, how, *_memory_row(forms[name], order.index(name))) for name in FORMS]
        answers.table("Memory", _MEMORY_HEAD, memory)
    _sum_up(answers, rows)


def _compare_passes(
    answers: Answers,
    table: list[tuple[Any, ...]],
    forms: Sequence[OpenForm],
    what: tuple[int, str],
) -> None:
    """Adds the passes of one number of rows, run in one way, to the table."""
    for pair in zip(*(form.passes(what[0]) for form in forms), strict=True):
        for form, one in zip(forms, pair, strict=True):
            form.warm(one)
        apart = compared(forms[0], forms[1], pair)
        times = in_turns([one.run for one in pair])
        key = f"{pair[0].name}, {what[0]} rows, {what[1]}"
        quartiles = {
            form: [short(ms) for ms in some] for form, some in zip(FORMS, times, strict=True)
        }
        facts = {"ms": quartiles, "apart": apart.apart, "finite": apart.finite}
        answers.put(passes={**answers.get("passes", {}), key: facts})
        ms = [some[1] for some in times]
        numbers = (short(ms[0]), short(ms[1]), short(ms[0] / ms[1]))
        table.append((pair[0].name, *what, *numbers, str(apart)))
        answers.table(_PASSES, _HEAD, table)


def _memory_row(form: OpenForm, place: int) -> tuple[Any, ...]:
    opened, all_ = form.opened_bytes / 1e9, (form.opened_bytes + form.pass_bytes) / 1e9
    first = ("first", "second")[place]
    return first, short(form.seconds), short(opened), short(all_), short(form.first_seconds)


def _sum_up(answers: Answers, rows: Sequence[tuple[Any, ...]]) -> None:
    ratios = [row[5] for row in rows]
    equal = sum(row[6] == "equal" for row in rows)
    answers.put(equal=equal == len(rows), ratio=short(median(ratios)))
    answers.say(
        f"weights as inputs take {min(ratios):.3g} to {max(ratios):.3g} times as long as inside, "
        f"median {median(ratios):.3g}; results are the same to the bit in {equal} of {len(rows)} "
        "passes"
    )
