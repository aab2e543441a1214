"""One request while it is being generated: its place in its text, its policies, and what it has cost so far."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twotower.config import GenerationConfig, ModelConfig
from twotower.runtime.results import Generation, Timings, Usage
from twotower.runtime.sampling import Choice, Sampling
from twotower.runtime.schedule import block_count
from twotower.runtime.stopping import Accepted, Continuation, StopRule
from twotower.runtime.tokenizer import IncrementalText, Tokenizer

__all__ = ["Commit", "Row", "text_end"]


class Commit(NamedTuple):
    """What one row took of one block."""

    row: Row
    taken: Accepted


def text_end(prompt_length: int, config: GenerationConfig) -> int:
    """Positions the context tower writes at most for a request: the last block, or token, is never read back."""
    if config.mode == "ar":
        return prompt_length + config.max_new_tokens - 1
    return (
        prompt_length
        + (block_count(config.max_new_tokens, config.block_size) - 1) * config.block_size
    )


class Row:
    """A request in work.

    Attributes:
        index: Number of the request in its call.
        prompt: [N] int64, N > 0.
        seed: Names its noise; None where it is greedy.
        length: Tokens the context tower has read, or is about to have read.
        nfe: Passes so far (see `Usage.nfe`).
        batch_passes: Denoiser passes of its batch while it was alive, whichever rows had masks.
        prefill: Seconds in the batch's prefill, and likewise
        denoise: in denoiser passes and
        extend: in context passes, while the row was alive.
    """

    __slots__ = (
        "_continuation",
        "_started",
        "_total",
        "batch_passes",
        "blocks",
        "config",
        "denoise",
        "extend",
        "index",
        "length",
        "nfe",
        "prefill",
        "prompt",
        "sampling",
        "seed",
    )

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index = index
        self.prompt: npt.NDArray[np.int64] = np.asarray(prompt, np.int64)
        self.config = config
        sampling = Sampling.from_config(config)
        self.seed = None if sampling.greedy else sampling.seed
        self.sampling: Choice = sampling
        eos = frozenset() if config.ignore_eos else frozenset(model.eos_token_ids)
        rule = StopRule(config.max_new_tokens, eos, config.stop)
        self._continuation = Continuation(rule, IncrementalText(tokenizer) if tokenizer else None)
        self.length = len(self.prompt)
        self.nfe = self.blocks = self.batch_passes = 0
        self.prefill = self.denoise = self.extend = self._started = self._total = 0.0

    @property
    def live(self) -> bool:
        """Whether the row still wants tokens."""
        return self._continuation.finish_reason is None

    @property
    def width(self) -> int:
        """Tokens it gets at a time: its block size, or 1 in `ar` mode."""
        return 1 if self.config.mode == "ar" else self.config.block_size

    def start(self) -> None:
        """Starts the row's clock."""
        self._started = perf_counter()

    def accept(self, tokens: Sequence[int]) -> Commit:
        """Takes a committed block: all of it, or as much as there is before the row's end."""
        taken = self._continuation.push(tokens)
        if self.config.mode == "diffusion":
            self.blocks += 1
        self._total = perf_counter() - self._started
        return Commit(self, taken)

    def result(self) -> Generation:
        """The finished row's result."""
        c = self._continuation
        assert c.finish_reason is not None
        usage = Usage(len(self.prompt), len(c.tokens), self.nfe, self.blocks)
        timings = Timings(
            *(1000 * s for s in (self.prefill, self.denoise, self.extend, self._total))
        )
        mode = self.config.mode
        tokens = tuple(c.tokens)
        return Generation(tokens, c.text, c.finish_reason, usage, timings, self.seed, mode=mode)
