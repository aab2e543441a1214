"""Sections `goldens-*`, `half-*` and `real-*`: a target through the commands that a user types.

Bundles are exported and engines built where they run: these need an environment of the project's
own, with the target's library in it. Of targets that compute experts in several ways all are asked,
first that of a build without a word: only the chosen experts, by kernels between programs, or in
one operator of ONNX Runtime.
"""

from __future__ import annotations

import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tools.agreement import measure_agreement
from tools.gpu.questions import Given
from tools.gpu.recorded_texts import (
    AUTOREGRESSIVE,
    FIXTURES,
    ROOT,
    recorded_options,
    recorded_texts,
)
from tools.gpu.rtx_setup import set_up_rtx
from tools.gpu.unpack import unpack
from twotower import TwoTower
from twotower.bench.speed import measure_passes
from twotower.builders.base import DENSE, KERNELS
from twotower.bundle import Bundle, load_engine_record
from twotower.cli.main import main as twotower
from twotower.doctor import Answers, SkipSectionError
from twotower.doctor.reference_answer import (
    REFERENCE_TARGET,
    check_answer,
    reference_answer_of,
)
from twotower.doctor.sections import short
from twotower.errors import EngineMismatchError
from twotower.evaluate.suite import load_suite
from twotower.hardware import TARGETS, probe_machine, select_target

__all__ = ["ARCHIVE", "Asked", "ask", "built", "refused", "store_reference_answer"]

TINY = ROOT / "assets" / "twotower-tiny"
ARCHIVE = "targets.tar.xz"
"""Of bundles with engines, in a pack."""

SLICE = "ME*"
"""Layers of the slice at published widths: one of each kind."""

CHANGES: dict[str, Any] = {}
"""What of the published widths is changed; nothing, but in tests."""

WAYS = {"rtx": ("", DENSE), "trt": ("", DENSE), "ort-cuda": ("", DENSE, KERNELS)}
"""What `--experts` is given, of targets that have several ways; empty for nothing, which fuses
experts in ort-cuda. What needs a compiler comes last."""

_ONE_WAY = ("",)
_LEAST_SECONDS = 40.0
"""Another way, which is built first, is not begun with less time than this."""

HALF = ("bfloat16", "float16")
"""The published type first."""

_NO_ROWS: tuple[int, ...] = ()
"""Are warmed up at opening. Most texts are single rows, for which kernels for 8 rows would be
compiled in vain; what times passes leaves the first ones out itself; and opening is timed, too."""

_GOLDENS_HEAD = ("model", "experts", "diffusion", "autoregressive")
_HALF_HEAD = ("type", "experts", "check", "right", "what was seen")
_REAL_HEAD = ("experts", "denoise ms", "extend ms", "GB/s", "seconds to build", "seconds to open")
_PROBLEMS = 9
"""Of each kind of the suite, for how many prompts keep the text of float32."""


def ask(answers: Answers, given: Given) -> None:
    what, _, target = given.name.partition("-")
    words = set_up_rtx(given) if target == "rtx" else ()
    if why := refused(target):
        raise SkipSectionError(why)
    questions = {"goldens": _goldens, "half": _half, "real": _real}
    questions[what](answers, Asked(target, _unpacked(given), tuple(words)))


def refused(target: str) -> str | None:
    """Why the target cannot run on this machine; None if it can."""
    try:
        select_target(probe_machine(), TARGETS, wanted=target)
    except EngineMismatchError as e:
        return e.found
    return None


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked, and where.

    Attributes:
        target: The target.
        work: The folder of its bundles.
        words: More words for `twotower build`.
        experts: What `--experts` is given; empty for nothing.
        apart: Whether bundles built in another way have a folder of their own.
    """

    target: str
    work: Path
    words: tuple[str, ...] = ()
    experts: str = ""
    apart: bool = True

    def ways(self, answers: Answers | None = None) -> Iterator[Asked]:
        """This for each way of computing experts, the default first, while there is time."""
        for experts in WAYS.get(self.target, _ONE_WAY):
            if experts and answers is not None and answers.left < _LEAST_SECONDS:
                answers.say(f"not asked with --experts {experts}: no time left")
                return
            yield replace(self, experts=experts)


def built(checkpoint: Path, asked: Asked, dtype: str, *, target: str | None = None) -> Path:
    """A bundle of a checkpoint with engines, by the commands a user types; those that fit are kept.

    Args:
        checkpoint: What is exported, unless its bundle is there.
        asked: The target, and where bundles lie.
        dtype: Of the bundle.
        target: Another target to build for.

    Raises:
        RuntimeError: a command failed; its words are in the log.
    """
    plain = asked.work / f"{checkpoint.name}-{dtype}"
    own = f"-{asked.experts}" if asked.experts and asked.apart else ""
    path = plain.with_name(plain.name + own)
    if not path.exists() and plain.exists():  # a pack's has the reference answer, too
        shutil.copytree(plain, path)
    words = ["export", str(checkpoint), "-o", str(path), "--dtype", dtype, "--no-verify"]
    if not path.exists() and twotower(words):
        raise RuntimeError(f"{checkpoint.name} could not be exported")
    more = asked.words if target is None else ()
    options = ["--target", target or asked.target]
    options += ["--experts", asked.experts] if asked.experts and target is None else []
    if twotower(["build", str(path), *options, *more]):
        raise RuntimeError(f"{path.name} could not be built for {target or asked.target}")
    return path


def store_reference_answer(bundle: Path, asked: Asked, dtype: str) -> None:
    """Computes twotower-tiny's reference answer into the bundle, for a machine that cannot."""
    built(TINY, asked, dtype, target=REFERENCE_TARGET)
    reference_answer_of(
        Bundle.open(bundle), partial(TwoTower.open, bundle, target=REFERENCE_TARGET)
    )
    shutil.rmtree(bundle / "engines" / REFERENCE_TARGET)


def _unpacked(given: Given) -> Path:
    """The folder of bundles, with those of the pack, if one was brought."""
    archive, folder = given.find(ARCHIVE), given.work / "targets"
    if archive is not None and not folder.is_dir():
        with tarfile.open(archive) as packed:
            unpack(packed, folder)
    folder.mkdir(exist_ok=True)
    return folder


def _computed(bundle: Path, target: str) -> str:
    """What computes the experts of a bundle's engines, as its build says."""
    record = load_engine_record(Bundle.open(bundle, contents=False), target)
    return str(
        record.report.get("choice_of_experts", {}).get("computed_by", "as the target has it")
    )


def _goldens(answers: Answers, asked: Asked) -> None:
    """Recorded tokens of both fixtures in float32, TF32 as the library has it."""
    rows: list[tuple[Any, ...]] = []
    for way in asked.ways(answers):
        for fixture in ("hybrid-a", "hybrid-b"):
            texts = recorded_texts(fixture)
            diffusion = ar = 0
            path = built(FIXTURES / fixture, way, "float32")
            with TwoTower.open(path, target=asked.target, warm_up=_NO_ROWS) as model:
                for text in texts:
                    out = model.generate(text["prompt"], recorded_options(text))
                    diffusion += list(out.tokens) == text["diffusion_tokens"]
                    out = model.generate(text["prompt"], AUTOREGRESSIVE)
                    ar += list(out.tokens) == text["ar_greedy_tokens"]
            right = (f"{diffusion} of {len(texts)}", f"{ar} of {len(texts)}")
            rows.append((fixture, _computed(path, asked.target), *right))
            answers.table("Recorded tokens, float32", _GOLDENS_HEAD, rows)


def _half(answers: Answers, asked: Asked) -> None:
    """The trained model in half precision: reference answer, and prompts that keep their text."""
    rows: list[tuple[Any, ...]] = []
    no_reference = refused(REFERENCE_TARGET)
    for way in asked.ways(answers):
        for dtype in HALF:
            path = built(TINY, way, dtype)
            bundle, label = Bundle.open(path), (dtype, _computed(path, asked.target))
            if no_reference is None:
                built(TINY, way, dtype, target=REFERENCE_TARGET)
            reference, source = reference_answer_of(
                bundle, partial(TwoTower.open, path, target=REFERENCE_TARGET)
            )
            with TwoTower.open(path, target=asked.target, warm_up=_NO_ROWS) as model:
                if reference is None:
                    rows.append((*label, "reference answer", None, source))
                else:
                    results = check_answer(reference, model, dtype)
                    rows += [(*label, r.name, r.ok, r.detail) for r in results]
                answers.table("twotower-tiny", _HALF_HEAD, rows)
                if no_reference is None:
                    rows += [(*label, *row) for row in _kept_texts(model, asked)]
                    answers.table("twotower-tiny", _HALF_HEAD, rows)


def _kept_texts(model: TwoTower, asked: Asked) -> Iterator[tuple[Any, ...]]:
    """For how many prompts of the suite the text is that of float32 on a CPU."""
    wide = built(TINY, asked, "float32", target=REFERENCE_TARGET)
    with TwoTower.open(wide, target=REFERENCE_TARGET) as reference:
        problems = load_suite().only(limit=_PROBLEMS).problems
        for a in measure_agreement(reference, model, problems):
            yield f"the text of float32, {a.mode}", None, f"{a.percent:.1f} % of prompts"


def _real(answers: Answers, asked: Asked) -> None:
    """One layer of each kind at published widths with random weights: time of a pass."""
    from twotower.checkpoint.synthetic import SyntheticOptions, published_slice, write_checkpoint

    checkpoint = asked.work / "real"
    if not (checkpoint / "config.json").is_file():
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(checkpoint, {**published_slice(SLICE), **CHANGES}, SyntheticOptions())
    # ONNX Runtime's CUDA provider has no bfloat16 kernels for several operators of the graphs.
    dtype = "float16" if asked.target == "ort-cuda" else "bfloat16"
    answers.put(dtype=dtype)
    rows: list[tuple[Any, ...]] = []
    for way in replace(asked, apart=False).ways(answers):
        began = time.monotonic()
        path = built(checkpoint, way, dtype)
        build_seconds, computed = time.monotonic() - began, _computed(path, asked.target)
        began = time.monotonic()
        with TwoTower.open(path, target=asked.target, warm_up=_NO_ROWS) as model:
            open_seconds = time.monotonic() - began
            times = measure_passes(Bundle.open(path, contents=False), model).to_json()
        answers.put(passes={**answers.get("passes", {}), computed: times})
        numbers = (times["denoise_ms"], times["extend_ms"], times["denoise_gb_per_s"])
        rows.append((computed, *map(short, (*numbers, build_seconds, open_seconds))))
        answers.table(f"Layers {SLICE}, {dtype}", _REAL_HEAD, rows)
    words = [f"{row[1]:g} ms a denoiser pass with experts {row[0]}" for row in rows]
    answers.say(f"layers {SLICE} in {dtype}: {', '.join(words)}")
