"""When a row's text ends: its end-of-sequence token, a stop string, or its length; and what of it is handed out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twotower.runtime.tokenizer import IncrementalText

__all__ = ["EOS", "LENGTH", "STOP", "Accepted", "Continuation", "StopRule"]

EOS, STOP, LENGTH = "eos", "stop", "length"


@dataclass(frozen=True, slots=True)
class StopRule:
    """What ends a row.

    Attributes:
        max_new_tokens: Most tokens it may have.
        eos_ids: Tokens that end it and are not part of it; empty to go on past them.
        stop: Strings that end it and are not part of its text.
    """

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a row takes of a block: its tokens, the text that became certain (None without a tokenizer), and the end if it came."""

    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str | None


class Continuation:
    """A row's generated tokens and text, with the rule that ends them.

    Tokens are taken one by one. The row ends before the first end-of-sequence token; or with the
    token whose text first completes a stop string, the text being cut before the earliest stop
    string found there; or with its last allowed token. A stop string may lie across blocks, so text
    that could be the beginning of one is held back until it is known.
    """

    def __init__(self, rule: StopRule, decoder: IncrementalText | None) -> None:
        assert decoder is not None or not rule.stop, (
            "stop strings without a tokenizer are refused with the request"
        )
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

    def push(self, tokens: Iterable[int]) -> Accepted:
        """Takes the tokens of a committed block, up to the row's end."""
        assert self.finish_reason is None, "a finished row takes no tokens"
        before = len(self.tokens)
        for token in tokens:
            self.finish_reason = self._take(token)
            if self.finish_reason:
                break
        if self._decoder is None:
            return Accepted(tuple(self.tokens[before:]), None, self.finish_reason)
        if self.finish_reason in (EOS, LENGTH):
            self._text += self._decoder.flush()
        end = len(self._text) - (
            0 if self.finish_reason else _held_back(self._text, self._rule.stop)
        )
        new, self._out = self._text[self._out : end], end
        return Accepted(tuple(self.tokens[before:]), new, self.finish_reason)

    def _take(self, token: int) -> str | None:
        if token in self._rule.eos_ids:
            return EOS
        self.tokens.append(token)
        if self._decoder is not None and self._reads_stop(self._decoder.push(token)):
            return STOP
        return LENGTH if len(self.tokens) >= self._rule.max_new_tokens else None

    def _reads_stop(self, new: str) -> bool:
        """Adds text; True when it completes a stop string, with the text cut before it."""
        searched = len(self._text)
        self._text += new
        found = [
            at
            for s in self._rule.stop
            if (at := self._text.find(s, max(searched - len(s) + 1, 0))) >= 0
        ]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of the text that could be the beginning of a stop string."""
    return max(
        (n for s in stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n])),
        default=0,
    )
