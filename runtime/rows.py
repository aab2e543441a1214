"""A request while it is generated: its tokens and text, where they end, and what they cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import numpy.typing as npt

from twotower.config import GenerationConfig, ModelConfig
from twotower.runtime.results import BlockEvent, Generation, Timings, Usage
from twotower.runtime.sampling import Choice, Sampling
from twotower.runtime.schedule import block_count
from twotower.runtime.tokenizer import IncrementalText, Tokenizer

EOS, STOP, LENGTH = "eos", "stop", "length"


@dataclass(frozen=True, slots=True)
class StopRule:
    """What ends a row: its length, end-of-sequence ids, or stop strings; neither is returned."""

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


class Continuation:
    """A row's generated tokens and text, with the rule that ends them.

    Tokens are taken one by one. The row ends before the first end-of-sequence token; or with the
    token whose text first completes a stop string, the text being cut before the earliest stop
    string found there; or with its last allowed token. A stop string may lie across blocks, so text
    that could be the beginning of one is held back until it is known.

    Attributes:
        finish_reason: `eos`, `stop` or `length` once it has ended.
    """

    def __init__(self, rule: StopRule, decoder: IncrementalText | None) -> None:
        assert decoder or not rule.stop, "a request with stop strings and no tokenizer is refused"
        self._rule = rule
        self._decoder = decoder
        self._out = 0  # characters handed out
        self._text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    @property
    def text(self) -> str | None:
        """All text so far, held-back text included; None without a tokenizer."""
        return None if self._decoder is None else self._text

    def push(self, tokens: Iterable[int]) -> str | None:
        """Takes a committed block up to the row's end; returns the text that became certain."""
        assert self.finish_reason is None, "a finished row takes no tokens"
        for token in tokens:
            self.finish_reason = self._take(token)
            if self.finish_reason:
                break
        if self._decoder is None:
            return None
        if self.finish_reason in (EOS, LENGTH):
            self._text += self._decoder.flush()
        end = len(self._text)
        if not self.finish_reason:
            end -= self._held_back()
        new, self._out = self._text[self._out : end], end
        return new

    def _take(self, token: int) -> str | None:
        if token in self._rule.eos_ids:
            return EOS
        self.tokens.append(token)
        if self._decoder is not None and self._reads_stop(self._decoder.push(token)):
            return STOP
        if len(self.tokens) >= self._rule.max_new_tokens:
            return LENGTH
        return None

    def _reads_stop(self, new: str) -> bool:
        """Adds text; True when it completes a stop string, with the text cut before it."""
        searched = len(self._text)
        self._text += new
        found = []
        for string in self._rule.stop:
            at = self._text.find(string, max(searched - len(string) + 1, 0))
            if at >= 0:
                found.append(at)
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def _held_back(self) -> int:
        """Characters at the end of the text that could be the beginning of a stop string."""
        most = 0
        for string in self._rule.stop:
            for count in range(1, min(len(string) - 1, len(self._text)) + 1):
                if self._text.endswith(string[:count]):
                    most = max(most, count)
        return most


class Row:
    """A request in work.

    Attributes:
        prompt: [N] int64, N > 0.
        seed: Names its noise; None where it is greedy.
        length: Tokens the context tower has read, or is about to have read.
        nfe: Passes so far (see `Usage.nfe`).
        batch_passes: Denoiser passes of its batch while it was alive, whichever rows had masks.
        seconds: Spent by its batch while it was alive, by the names of `Timings`.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index, self.config = index, config
        self.prompt: npt.NDArray[np.int64] = np.asarray(prompt, np.int64)
        self._model, self._tokenizer = model, tokenizer
        sampling = Sampling.from_config(config)
        self.seed = None if sampling.greedy else sampling.seed
        self.sampling: Choice = sampling
        eos = frozenset() if config.ignore_eos else frozenset(model.eos_token_ids)
        rule = StopRule(config.max_new_tokens, eos, config.stop)
        self._continuation = Continuation(rule, IncrementalText(tokenizer) if tokenizer else None)
        self.length = len(self.prompt)
        self.nfe = self.blocks = self.batch_passes = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self._started = 0.0

    def in_mode(self, mode: str) -> Row:
        """The same request from its beginning, in another mode."""
        config, prompt = replace(self.config, mode=mode), self.prompt.tolist()
        return Row(self.index, prompt, config, model=self._model, tokenizer=self._tokenizer)

    @property
    def live(self) -> bool:
        """Whether the row still wants tokens."""
        return self._continuation.finish_reason is None

    @property
    def width(self) -> int:
        """Tokens it gets at a time: its block size, or 1 in `ar` mode."""
        if self.config.mode == "ar":
            return 1
        return self.config.block_size

    @property
    def end(self) -> int:
        """Positions the context tower writes at most: the last block, or token, is never read."""
        blocks = block_count(self.config.max_new_tokens, self.width)
        return len(self.prompt) + (blocks - 1) * self.width

    def start(self) -> None:
        """Starts the row's clock."""
        self._started = perf_counter()

    def accept(self, tokens: Sequence[int]) -> BlockEvent:
        """Takes a committed block: all of it, or as much as there is before the row's end."""
        before = len(self._continuation.tokens)
        text = self._continuation.push(tokens)
        new = tuple(self._continuation.tokens[before:])
        self.blocks += self.config.mode == "diffusion"
        if self.live:
            return BlockEvent(self.index, new, text, finished=False, result=None)
        self.seconds["total"] = perf_counter() - self._started
        return BlockEvent(self.index, new, text, finished=True, result=self._result())

    def _result(self) -> Generation:
        done, seconds = self._continuation, self.seconds
        spent = (seconds[name] for name in ("prefill", "denoise", "extend", "total"))
        assert done.finish_reason is not None
        return Generation(
            tuple(done.tokens),
            done.text,
            done.finish_reason,
            Usage(
                len(self.prompt),
                len(done.tokens),
                self.nfe,
                self.blocks,
            ),
            Timings(*(1000 * one for one in spent)),
            self.seed,
            self.config.mode,
        )
