"""Refuses numbers no sound engine returns, before any of them becomes text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.config import ModelConfig
from twotower.errors import EngineOutputError
from twotower.runtime.buffers import DenoiserArrays
from twotower.runtime.memory import Array
from twotower.runtime.rows import Row
from twotower.spec import CANDIDATE_LOGPROBS, CONFIDENCE, CONTEXT, DENOISER, NEXT_BLOCK

__all__ = ["check_block", "check_candidates", "check_step"]

_DO = "run the request again; if it fails again, build the engine again, or try another target or a wider dtype (float16 overflows first)"


def check_step(rows: Sequence[Row], arrays: DenoiserArrays, *, block: int, step: int) -> None:
    """Checks what the denoiser returned for the rows that are alive.

    Raises:
        EngineOutputError: a confidence is not a number.
    """
    if np.isfinite(arrays.confidence).all():
        return
    for i, row in enumerate(rows):
        if row.live and not np.isfinite(arrays.confidence[i]).all():
            found = f"{CONFIDENCE} {_first_bad(arrays.confidence[i])}"
            raise _fault(DENOISER, f"row {row.index}, block {block}, step {step}", found)


def check_block(rows: Sequence[Row], tokens: Array, config: ModelConfig, *, block: int) -> None:
    """Checks a block that the denoiser says is complete, [B,S] int64.

    Raises:
        EngineOutputError: a token is a mask or outside the vocabulary.
    """
    wrong = (tokens < 0) | (tokens >= config.vocab_size) | (tokens == config.mask_token_id)
    if not wrong.any():
        return
    for i, row in enumerate(rows):
        if row.live and wrong[i].any():
            at = int(np.argmax(wrong[i]))
            found = f"{NEXT_BLOCK} holds {int(tokens[i, at])} at position {at} after the last step (masks are {config.mask_token_id}, "
            raise _fault(DENOISER, f"row {row.index}, block {block}", found + f"the vocabulary ends at {config.vocab_size - 1})")


def check_candidates(row: Row, ids: Array, logprobs: Array, config: ModelConfig, *, token: int) -> None:
    """Checks one row's candidates, [K] each; a candidate that cannot be chosen may have a log-probability of -inf, the best may not.

    Raises:
        EngineOutputError: a log-probability is not a number, or a token is outside the vocabulary.
    """
    if np.isfinite(logprobs[0]) and not np.isnan(logprobs).any() and ids.min() >= 0 and ids.max() < config.vocab_size:
        return
    found = f"{CANDIDATE_LOGPROBS} {_first_bad(logprobs)}; tokens {int(ids.min())} to {int(ids.max())} of {config.vocab_size}"
    raise _fault(CONTEXT, f"row {row.index}, token {token}", found)


def _fault(tower: str, where: str, found: str) -> EngineOutputError:
    return EngineOutputError(f"the {tower} engine returned numbers that cannot be right ({where})", found=found, do=_DO)


def _first_bad(values: Array) -> str:
    """The first value that is not finite, with its place; else the first value."""
    at = int(np.argmax(~np.isfinite(values)))
    return f"is {float(values[at])} at position {at}"
