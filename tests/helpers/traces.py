"""A small trace made by hand: two blocks of four, six passes, one prediction that changes."""

from __future__ import annotations

from typing import Any

from twotower.trace.record import Trace, TraceBlock, TraceEnd, TraceHeader, TraceStep

MASK = 3
PASSES: tuple[tuple[int, int, list[int], list[float], list[int]], ...] = (
    # block, step, predicted, confidence, committed
    (0, 0, [10, 11, 20, 13], [0.95, 0.99, 0.41, 0.6], [0, 1]),
    (0, 1, [10, 11, 12, 13], [0.9, 0.9, 0.7, 0.97], [3]),
    (0, 2, [10, 11, 12, 13], [0.9, 0.9, 0.99, 0.9], [2]),
    (1, 0, [14, 15, 2, 2], [0.96, 0.3, 0.5, 0.55], [0]),
    (1, 1, [14, 15, 2, 2], [0.96, 0.93, 0.8, 0.92], [1, 3]),
    (1, 2, [14, 15, 2, 2], [0.96, 0.93, 0.98, 0.9], [2]),
)
PIECES = {1: "<s>", 2: "</s>", MASK: "<mask>", 20: "guess"}
PIECES |= dict(enumerate(("one", " ", "two", "\n", "three", "!"), 10))


def small_trace(
    prompt: str | None = "Count",
    pieces: dict[int, str] | None = None,
    *,
    text: str | None = "one two\nthree!",
) -> Trace:
    """The trace; `pieces` replaces texts of tokens, `text` is None without a tokenizer."""
    steps, block_tokens = [], [MASK] * 4
    for block, step, predicted, confidence, committed in PASSES:
        before = [MASK] * 4 if step == 0 else block_tokens
        block_tokens = [predicted[p] if p in committed else before[p] for p in range(4)]
        steps.append(
            TraceStep(
                block=block,
                step=step,
                t=before.count(MASK) / 4,
                tokens=before,
                predicted=predicted,
                confidence=confidence,
                committed=committed,
                next=block_tokens,
                denoise_ms=5.0,
            )
        )
    usage: dict[str, Any] = {"prompt_tokens": 2, "completion_tokens": 6, "nfe": 6, "blocks": 2}
    usage |= {"steps_per_block": 3.0, "tokens_per_nfe": 1.0}
    options = {"confidence_threshold": 0.9, "steps_per_block": 4, "temperature": 0.0, "seed": 0}
    names = {
        str(t): str(t) if text is None else (pieces or {}).get(t, piece)
        for t, piece in PIECES.items()
    }
    return Trace(
        TraceHeader(
            twotower="0",
            bundle="small",
            target="ort-cpu",
            prompt=prompt,
            prompt_tokens=[1, 10],
            config=options,
            block_size=4,
            mask_token_id=MASK,
            pieces=names,
        ),
        tuple(steps),
        (
            TraceBlock(block=0, tokens=[10, 11, 12, 13], extend_ms=2.0),
            TraceBlock(block=1, tokens=[14, 15, 2, 2], extend_ms=None),
        ),
        TraceEnd(
            finish_reason="eos",
            tokens=[10, 11, 12, 13, 14, 15],
            text=text,
            usage=usage,
            timings_ms={"prefill": 3.0, "denoise": 30.0, "extend": 2.0, "total": 36.0},
        ),
    )
