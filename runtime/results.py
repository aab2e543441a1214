"""What a generation gives back, what a caller may watch meanwhile, and how it stops it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from twotower.errors import RequestCancelledError
from twotower.runtime.device import Array


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request read, wrote and cost.

    Attributes:
        prompt_tokens: Tokens read, BOS included.
        completion_tokens: Tokens returned: an end-of-sequence token and everything after a stop are
            not among them.
        nfe: Network passes this row needed: denoiser passes in which it still had masks; in `ar`
            mode passes of the context tower that produced a token (the end-of-sequence token
            included). The context passes of `diffusion` mode are not counted.
        blocks: Blocks denoised; 0 in `ar` mode.
    """

    prompt_tokens: int
    completion_tokens: int
    nfe: int
    blocks: int

    @property
    def steps_per_block(self) -> float:
        """Denoiser passes a block; 0 in `ar` mode."""
        if not self.blocks:
            return 0.0
        return self.nfe / self.blocks

    @property
    def tokens_per_nfe(self) -> float:
        """Returned tokens a pass."""
        if not self.nfe:
            return 0.0
        return self.completion_tokens / self.nfe

    def to_json(self) -> dict[str, Any]:
        """Plain data with the derived numbers."""
        return {
            **asdict(self),
            "steps_per_block": self.steps_per_block,
            "tokens_per_nfe": self.tokens_per_nfe,
        }


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock milliseconds of one request; rows of one batch share passes, so theirs overlap.

    Attributes:
        prefill: Reading the prompts of the batch.
        denoise: Denoiser passes while the row was alive; 0 in `ar` mode.
        extend: Context passes while the row was alive; in `ar` mode with the choice of the token.
        total: From the start of the batch to the row's end.
    """

    prefill: float
    denoise: float
    extend: float
    total: float


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of one request.

    Attributes:
        tokens: Generated ids, without the end-of-sequence token. After a stop string they end with
            the token that completed it, so their text may be longer than `text`.
        text: The text before any stop string; None without a tokenizer.
        finish_reason: `eos`, `stop` or `length`.
        seed: The seed its noise was drawn with, given or not: the request gives this text again
            with it. None at temperature 0.
        mode: `diffusion` or `ar`: how it was generated, also where the request said `auto`.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str
    usage: Usage
    timings: Timings
    seed: int | None = None
    mode: str = "diffusion"

    def to_json(self) -> dict[str, Any]:
        """The object `--json` prints; `text` only where there is a tokenizer."""
        out: dict[str, Any] = {"tokens": list(self.tokens)}
        if self.text is not None:
            out["text"] = self.text
        out["finish_reason"] = self.finish_reason
        out["mode"] = self.mode
        out["seed"] = self.seed
        out["usage"] = self.usage.to_json()
        out["timings_ms"] = asdict(self.timings)
        return out


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Tokens of one request as they are committed: a block, or one token in `ar` mode.

    Attributes:
        tokens: New tokens; all events of a row together give the result's tokens.
        text: New text, likewise; None without a tokenizer. It may lag behind the tokens: text that
            could still become part of a stop string, or of a character whose last bytes are
            missing, is held back.
        result: The whole result, with the last event.
    """

    row: int
    tokens: tuple[int, ...]
    text: str | None
    finished: bool
    result: Generation | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One denoiser pass as it went in and came out, copied for the caller.

    Attributes:
        block_index: Number of the block in the rows' texts.
        step: Number of the step in the block.
        rows: For each of the B rows, the number of its request in the call, or -1 where nothing was
            masked any more.
        block_in: [B,S] int64 before the pass, and
        next_block: [B,S] int64 after it.
        predicted: [B,S] int64.
        confidence: [B,S] float32.
        t: [B] float32, the masked fraction of each row's block.
        ms: Wall-clock milliseconds of the pass, waiting for its result included.
    """

    block_index: int
    step: int
    rows: tuple[int, ...]
    block_in: Array
    predicted: Array
    confidence: Array
    next_block: Array
    t: Array
    ms: float


@dataclass(frozen=True, slots=True)
class Hooks:
    """Callbacks of one call; they run between passes, in the caller's thread.

    Attributes:
        on_step: Called after every denoiser pass.
        on_prefill: Called with (tokens read, tokens to read) of a batch's prompts, after every
            chunk.
        cancelled: Asked before every pass; True ends the call with a `RequestCancelledError`.
    """

    on_step: Callable[[StepRecord], None] | None = None
    on_prefill: Callable[[int, int], None] | None = None
    cancelled: Callable[[], bool] | None = None

    def raise_if_cancelled(self) -> None:
        """Ends the call if the caller wants it ended."""
        if self.cancelled is not None and self.cancelled():
            raise RequestCancelledError(
                "the request was cancelled",
                found="`cancelled` returned True between two passes",
                do="nothing; the session is still usable",
            )
