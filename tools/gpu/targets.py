"""Sections `goldens-*`, `half-*` and `real-*`: a target through the commands that a user types.

Bundles are exported and engines built where they run: these need an environment of the project's
own, with the target's library in it.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from tools.gpu.cuda_layer import FIXTURES, ROOT, recorded_options
from tools.gpu.questions import Given
from twotower import GenerationConfig, TwoTower
from twotower.bench.passes import measure_passes
from twotower.bundle import Bundle
from twotower.cli.main import main as twotower
from twotower.doctor import Answers, SkipSectionError
from twotower.doctor.sections import short
from twotower.errors import EngineMismatchError
from twotower.evaluate import KEPT_BY, check_answer, known_answer_of, setting_of
from twotower.evaluate.agreement import measure_agreement
from twotower.evaluate.suite import load_suite
from twotower.hardware import TARGETS, probe_machine, select_target

__all__ = ["ask", "built", "refused"]

TINY = ROOT / "assets" / "twotower-tiny"
SLICE = "ME*"
"""Layers of the slice at published widths: one of each kind."""

CHANGES: dict[str, Any] = {}
"""What of the published widths is changed; nothing, but in tests."""

HALF = ("float16", "bfloat16")
_PROBLEMS = 9
"""Of each kind of the suite, for how many prompts keep the text of float32."""


def ask(answers: Answers, given: Given) -> None:
    what, _, target = given.name.partition("-")
    if why := refused(target):
        raise SkipSectionError(why)
    {"goldens": _goldens, "half": _half, "real": _real}[what](answers, target, given.work)


def refused(target: str) -> str | None:
    """Why the target cannot run on this machine; None if it can."""
    try:
        select_target(probe_machine(), TARGETS, wanted=target)
    except EngineMismatchError as e:
        return e.found
    return None


def built(checkpoint: Path, folder: Path, dtype: str, *, target: str) -> Path:
    """A bundle of a checkpoint with a target's engines, by the commands a user types.

    Raises:
        RuntimeError: a command failed; its words are in the log.
    """
    path = folder / f"{checkpoint.name}-{dtype}"
    words = ["export", str(checkpoint), "-o", str(path), "--dtype", dtype, "--no-verify"]
    if not path.exists() and twotower(words):
        raise RuntimeError(f"{checkpoint.name} could not be exported")
    if twotower(["build", str(path), "--target", target]):
        raise RuntimeError(f"{path.name} could not be built for {target}")
    return path


def _sm() -> int | None:
    gpus = probe_machine().gpus
    return gpus[0].sm if gpus else None


def _goldens(answers: Answers, target: str, work: Path) -> None:
    """Recorded tokens of both fixtures in float32, TF32 as the library has it."""
    rows: list[tuple[Any, ...]] = []
    for fixture in ("hybrid-a", "hybrid-b"):
        texts = json.loads((FIXTURES / fixture / "golden.json").read_text(encoding="utf-8"))
        diffusion = ar = 0
        with TwoTower.open(
            built(FIXTURES / fixture, work, "float32", target=target), target=target
        ) as model:
            for text in texts:
                out = model.generate(text["prompt"], recorded_options(text))
                diffusion += list(out.tokens) == text["diffusion_tokens"]
                config = GenerationConfig(mode="ar", max_new_tokens=24, ignore_eos=True)
                ar += (
                    list(model.generate(text["prompt"], config).tokens) == text["ar_greedy_tokens"]
                )
        rows.append((fixture, f"{diffusion} of {len(texts)}", f"{ar} of {len(texts)}"))
        answers.table("Recorded tokens, float32", ("model", "diffusion", "autoregressive"), rows)


def _half(answers: Answers, target: str, work: Path) -> None:
    """The trained model in half precision: its known answer, and prompts that keep their text."""
    rows: list[tuple[Any, ...]] = []
    wide = built(TINY, work, "float32", target=KEPT_BY)
    for dtype in HALF:
        path = built(TINY, work, dtype, target=target)
        built(TINY, work, dtype, target=KEPT_BY)
        bundle = Bundle.open(path)
        known, _ = known_answer_of(bundle, lambda path=path: TwoTower.open(path, target=KEPT_BY))  # type: ignore[misc]
        assert known is not None, "this very bundle has an ort-cpu engine"
        setting = setting_of(bundle, target, _sm())
        with (
            TwoTower.open(path, target=target) as model,
            TwoTower.open(wide, target=KEPT_BY) as reference,
        ):
            rows += [(dtype, r.name, r.ok, r.detail) for r in check_answer(known, model, setting)]
            problems = load_suite().only(limit=_PROBLEMS).problems
            for a in measure_agreement(reference, model, problems):
                share = f"{a.percent:.1f} % of prompts"
                rows.append((dtype, f"the text of float32, {a.mode}", None, share))
        answers.table("twotower-tiny", ("type", "check", "right", "what was seen"), rows)


def _real(answers: Answers, target: str, work: Path) -> None:
    """One layer of each kind at published widths with random weights: time of a pass."""
    from twotower.export.synthetic import SyntheticOptions, published_slice, write_checkpoint

    checkpoint = work / "real"
    if not (checkpoint / "config.json").is_file():
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(checkpoint, {**published_slice(SLICE), **CHANGES}, SyntheticOptions())
    # ONNX Runtime's CUDA provider has no bfloat16 kernels for several operators of the graphs.
    dtype = "float16" if target == "ort-cuda" else "bfloat16"
    began = time.monotonic()
    path = built(checkpoint, work, dtype, target=target)
    answers.put(dtype=dtype, export_and_build_seconds=short(time.monotonic() - began))
    began = time.monotonic()
    with TwoTower.open(path, target=target) as model:
        answers.put(open_seconds=short(time.monotonic() - began))
        times = measure_passes(Bundle.open(path, contents=False), model).to_json()
    answers.put(passes=times)
    answers.say(
        f"layers {SLICE} in {dtype}: {times['denoise_ms']:.3f} ms a denoiser pass "
        f"({times['denoise_gb_per_s']:.0f} GB/s of weights), "
        f"{times['extend_ms']:.3f} ms an extension ({times['extend_gb_per_s']:.0f} GB/s)"
    )
