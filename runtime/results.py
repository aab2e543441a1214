"""What a request gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["BlockEvent", "Generation", "Timings", "Usage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: Tokens read before the first new one.
        completion_tokens: Tokens returned.
        nfe: Denoiser passes this row needed; in `ar` mode, tokens computed.
        blocks: Blocks denoised; in `ar` mode a block is one token.
        steps_per_block: nfe / blocks.
        tokens_per_nfe: completion_tokens / nfe.
    """

    prompt_tokens: int
    completion_tokens: int
    nfe: int
    blocks: int

    @property
    def steps_per_block(self) -> float:
        return self.nfe / self.blocks if self.blocks else 0.0

    @property
    def tokens_per_nfe(self) -> float:
        return self.completion_tokens / self.nfe if self.nfe else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "steps_per_block": self.steps_per_block, "tokens_per_nfe": self.tokens_per_nfe}


@dataclass(slots=True, kw_only=True)
class Timings:
    """Milliseconds from the start of a request's batch to the row's end: reading the prompt, denoising (or, in `ar` mode, choosing
    tokens), extending the context, and in all."""

    prefill: float = 0.0
    denoise: float = 0.0
    extend: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One finished request.

    Attributes:
        tokens: New token ids, without the end-of-sequence token and without a stop string's.
        text: The new text, None where the bundle has no tokenizer.
        finish_reason: `eos`, `stop` or `length`.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str
    usage: Usage
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        """The object `twotower generate --json` prints."""
        return {
            "tokens": list(self.tokens),
            **({} if self.text is None else {"text": self.text}),
            "finish_reason": self.finish_reason,
            "usage": self.usage.to_json(),
            "timings_ms": {k: round(v, 3) for k, v in asdict(self.timings).items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEvent:
    """A committed block of one row, or its end.

    Attributes:
        row: The request's place in the list given.
        tokens: Tokens this event adds; a later stop string may take some of them back (see `result`).
        text: Text this event adds, None without a tokenizer; never half a character or the beginning of a stop string.
        result: The whole outcome, with the row's last event only.
    """

    row: int
    tokens: tuple[int, ...]
    text: str | None
    result: Generation | None

    @property
    def finished(self) -> bool:
        return self.result is not None
