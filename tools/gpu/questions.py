"""The questions of the first hour on a GPU, and what their sections are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twotower.doctor import SkipSectionError

__all__ = ["CALL_SECONDS", "QUESTIONS", "Given", "Question"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One section of the first hour.

    Attributes:
        text: The question.
        seconds: Its time limit.
        module: The module whose `ask(answers, given)` answers it.
        call: With which part of a pack it is asked; None where it needs the project's environment.
    """

    text: str
    seconds: float
    module: str
    call: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a section works with.

    Attributes:
        name: The section's name.
        pack: Folders that `make gpu-pack` has filled; empty in a checkout with an environment.
        work: A folder for scratch files that all sections of a run share.
    """

    name: str
    pack: tuple[Path, ...]
    work: Path

    def find(self, name: str) -> Path | None:
        """A file or folder of the pack; None where it was not brought."""
        return next((found for folder in self.pack if (found := folder / name).exists()), None)

    def need(self, name: str) -> Path:
        """The same.

        Raises:
            SkipSectionError: it was not brought.
        """
        found = self.find(name)
        if found is None:
            raise SkipSectionError(f"{name} was not brought: `make gpu-pack` prepares it")
        return found


CALL_SECONDS = {1: 220, 2: 560}
"""For all sections of a part of a pack. Their limits may be more together: sections are rarely
stopped by them, and the last is given what those before it have left."""

GPU_TARGETS = ("rtx", "trt", "ort-cuda")

_OF_TARGETS = {
    "goldens": "Does {} write the recorded tokens in float32?",
    "half": "Is {} right in half precision, and what does it look like if not?",
    "real": "How long is a pass of {} with one layer of each kind at published widths?",
}


def _target(what: str, target: str, *, seconds: float, call: int | None = None) -> Question:
    text = _OF_TARGETS[what].format(target)
    return Question(text=text, seconds=seconds, module="tools.gpu.targets", call=call)


def _full(graph: str) -> Question:
    text = f"How long is a {graph} pass of the published model with TensorRT for RTX?"
    return Question(text=text, seconds=120, module="tools.gpu.full_size", call=2)


QUESTIONS = {
    "machine": Question(
        text="What is this machine?",
        seconds=20,
        module="tools.gpu.machine",
        call=1,
    ),
    "ceilings": Question(
        text="How fast are copies, reads and bfloat16 products at best?",
        seconds=30,
        module="tools.gpu.ceilings",
        call=1,
    ),
    "cuda-layer": Question(
        text="Does the runtime's CUDA layer write the recorded tokens, with torch as the engine?",
        seconds=100,
        module="tools.gpu.cuda_layer",
        call=1,
    ),
    "launches": Question(
        text="What does a kernel cost in a CUDA graph, on one stream and on eight?",
        seconds=30,
        module="tools.gpu.launches",
        call=1,
    ),
    "experts": Question(
        text="Are the expert kernels, compiled elsewhere, right at published sizes, and how fast?",
        seconds=100,
        module="tools.gpu.experts",
        call=1,
    ),
    "rtx": Question(
        text="Does TensorRT for RTX run on this GPU, and with which capability of a plan?",
        seconds=120,
        module="tools.gpu.rtx",
        call=2,
    ),
    "goldens-rtx": _target("goldens", "rtx", seconds=100, call=2),
    "full-denoiser": _full("denoiser"),
    "full-context": _full("context"),
    "half-rtx": _target("half", "rtx", seconds=100, call=2),
    "forms": Question(
        text="Do engines that read weights as inputs lose anything to engines that hold them?",
        seconds=180,
        module="tools.gpu.forms",
        call=2,
    ),
    **{f"goldens-{t}": _target("goldens", t, seconds=150) for t in ("trt", "ort-cuda")},
    **{f"half-{t}": _target("half", t, seconds=300) for t in ("trt", "ort-cuda")},
    **{f"real-{t}": _target("real", t, seconds=300) for t in GPU_TARGETS},
}
"""Sections by name, in the order they are asked: what the others depend on first."""
