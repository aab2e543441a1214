"""A diffusion generation recorded pass by pass: what the denoiser read, predicted and filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from twotower import __version__
from twotower.config import GenerationConfig
from twotower.errors import TraceError
from twotower.runtime import StepRecord, TwoTower

KIND = "twotower-trace"
SCHEMA = 1
_FIGURES = ("completion_tokens", "tokens_per_nfe", "prefill", "denoise", "extend", "total")
_DIGITS = 6  # of a confidence: float32 has no more


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What was run, recorded by version `twotower`.

    Names of bundle folder and target are empty where the engines were handed over open; `prompt` is
    None where token ids were given. `config` is `GenerationConfig.to_json()` with the seed that was
    used; `pieces` are texts of every token id that occurs, numbers without a tokenizer.
    """

    twotower: str
    bundle: str
    target: str
    prompt: str | None
    prompt_tokens: list[int]
    config: dict[str, Any]
    block_size: int
    mask_token_id: int
    pieces: dict[str, str]

    def __post_init__(self) -> None:
        has_threshold = isinstance(self.config.get("confidence_threshold"), (int, float))
        if self.block_size < 1 or not has_threshold:
            raise ValueError("blocks of no size, or a config without confidence_threshold")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """One denoiser pass; every list but `committed` (positions it filled) has S entries.

    `t` is the masked fraction of the block before the pass; `tokens` and `next` are the block
    before and after; predictions are of all positions, masked or not, confidences have six digits;
    `denoise_ms` is wall-clock time.
    """

    block: int
    step: int
    t: float
    tokens: list[int]
    predicted: list[int]
    confidence: list[float]
    committed: list[int]
    next: list[int]
    denoise_ms: float

    @property
    def lowest(self) -> float | None:
        """The lowest confidence of what was filled; None where nothing was."""
        return min((self.confidence[position] for position in self.committed), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceBlock:
    """One finished block with its S tokens, which in the last one may go on past the text's end.

    `extend_ms` is from the end of its last pass to the start of the next block's first, while the
    context tower reads the block; an engine that works beside the host may move some of that into
    the pass. None for the last block, which is never read.
    """

    block: int
    tokens: list[int]
    extend_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEnd:
    """The result, as in `Generation`."""

    finish_reason: str
    tokens: list[int]
    text: str | None
    usage: dict[str, float]
    timings_ms: dict[str, float]

    def __post_init__(self) -> None:
        known = {*self.usage, *self.timings_ms}
        missing = [name for name in _FIGURES if name not in known]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole recording."""

    header: TraceHeader
    steps: tuple[TraceStep, ...]
    blocks: tuple[TraceBlock, ...]
    end: TraceEnd

    def piece(self, token: int) -> str:
        """Text of a token that occurs in the trace; the number of any other."""
        return self.header.pieces.get(str(token), str(token))

    @property
    def has_text(self) -> bool:
        """Whether pieces are text and not numbers."""
        return self.end.text is not None


def record_trace(
    model: TwoTower,
    prompt: str | Sequence[int],
    config: GenerationConfig | None = None,
    *,
    bundle: str = "",
    watch: Callable[[TraceStep], None] | None = None,
) -> Trace:
    """Generates one text and keeps every pass; `watch` is called with each as it comes.

    `bundle` is the name of its folder, for the header.

    Raises:
        TraceError: the mode is not `diffusion`.
        RequestError: the request cannot be served.
    """
    config = config or model.defaults
    if config.mode != "diffusion":
        raise TraceError(
            f"there is nothing to trace in mode {config.mode!r}",
            found="a trace is of denoiser passes, which the context tower alone does not make",
            do="leave out `--mode`, or use `twotower generate`",
        )
    recorder = _Recorder(model.config.mask_token_id, watch)
    result = model.generate(
        prompt if isinstance(prompt, str) else list(prompt) or [model.config.bos_token_id],
        config,
        on_step=recorder,
    )
    if result.seed is not None:
        config = replace(config, seed=result.seed)  # as drawn: the trace can be made again
    piece = model.tokenizer.piece if model.tokenizer else str
    ids = prompt
    if isinstance(ids, str):
        assert model.tokenizer is not None  # or the generation had refused the text
        ids = model.tokenizer.encode(ids)
    tokens = [int(t) for t in ids] or [model.config.bos_token_id]  # as the session reads it
    seen = {*tokens, model.config.mask_token_id}
    for step in recorder.steps:
        seen.update(step.predicted, step.next)
    header = TraceHeader(
        twotower=__version__,
        bundle=bundle,
        target=model.target,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_tokens=tokens,
        config=config.to_json(),
        block_size=config.block_size,
        mask_token_id=model.config.mask_token_id,
        pieces={str(t): piece(t) for t in sorted(seen)},
    )
    facts = result.to_json()
    end = TraceEnd(
        finish_reason=result.finish_reason,
        tokens=list(result.tokens),
        text=result.text,
        usage=facts["usage"],
        timings_ms={k: round(v, 3) for k, v in facts["timings_ms"].items()},
    )
    return Trace(header, tuple(recorder.steps), recorder.blocks(), end)


class _Recorder:
    """The `on_step` of a recording: passes in plain data, and the time between blocks."""

    def __init__(self, mask: int, watch: Callable[[TraceStep], None] | None) -> None:
        self.steps: list[TraceStep] = []
        self._mask, self._watch = mask, watch
        self._extend_ms: list[float] = []
        self._left = 0.0

    def __call__(self, record: StepRecord) -> None:
        arrived = perf_counter()
        if self.steps and record.step == 0:
            self._extend_ms.append(round(max(1000 * (arrived - self._left) - record.ms, 0.0), 3))
        before, after = record.block_in[0], record.next_block[0]
        step = TraceStep(
            block=record.block_index,
            step=record.step,
            t=round(float(record.t[0]), _DIGITS),
            tokens=before.tolist(),
            predicted=record.predicted[0].tolist(),
            confidence=[round(float(c), _DIGITS) for c in record.confidence[0]],
            committed=np.flatnonzero((before == self._mask) & (after != self._mask)).tolist(),
            next=after.tolist(),
            denoise_ms=round(record.ms, 3),
        )
        self.steps.append(step)
        if self._watch is not None:
            self._watch(step)
        self._left = perf_counter()  # the watcher's own time is nobody's

    def blocks(self) -> tuple[TraceBlock, ...]:
        """The blocks of the passes so far."""
        tokens = {step.block: step.next for step in self.steps}
        times = [*self._extend_ms, None]
        return tuple(TraceBlock(block=b, tokens=t, extend_ms=times[b]) for b, t in tokens.items())
