"""When a row's text ends: end of sequence, a stop string, or its length; and what of it may be shown already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twotower.config import GenerationConfig
from twotower.runtime.tokenizer import TextStream, Tokenizer

__all__ = ["RowText"]


class RowText:
    """The growing answer of one row.

    Args:
        config: Stop strings, length, end-of-sequence handling.
        eos: End-of-sequence token ids.
        tokenizer: For text and stop strings; None for token ids alone.

    Attributes:
        tokens: Accepted token ids, neither end-of-sequence nor stop string among them once finished.
        finish_reason: `eos`, `stop`, `length`, or None while the text goes on.
    """

    def __init__(self, config: GenerationConfig, eos: Sequence[int], tokenizer: Tokenizer | None) -> None:
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._config = config
        self._eos = frozenset() if config.ignore_eos else frozenset(eos)
        self._tokenizer = tokenizer
        self._stream: TextStream | None = tokenizer.stream() if tokenizer else None
        self._text = ""
        self._ends: list[int] = []  # length of the text after each token
        self._shown = 0
        self._longest = max((len(s) for s in config.stop), default=0)

    @property
    def text(self) -> str | None:
        """All text so far, None without a tokenizer."""
        return self._text if self._stream else None

    def feed(self, tokens: Iterable[int]) -> tuple[tuple[int, ...], str | None]:
        """Takes committed tokens up to where the text ends; returns the accepted ones and the text that may now be shown."""
        before = len(self.tokens)
        for token in tokens:
            if token in self._eos:
                self._finish("eos")
                break
            self._accept(token)
            if self.finish_reason is None and len(self.tokens) == self._config.max_new_tokens:
                self._finish("length")
            if self.finish_reason is not None:
                break
        return tuple(self.tokens[before:]), self._show()

    def _accept(self, token: int) -> None:
        self.tokens.append(token)
        if self._stream is None:
            return
        piece = self._stream.step(token)
        searched_from = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        self._ends.append(len(self._text))
        cuts = [i for s in self._config.stop if (i := self._text.find(s, searched_from)) >= 0] if piece else []
        if cuts:
            self._cut(min(cuts))

    def _cut(self, at: int) -> None:
        """Ends the text before a stop string; tokens whose text reaches past the cut go with it."""
        self._text = self._text[:at]
        while self._ends and self._ends[-1] > at:
            self._ends.pop()
            self.tokens.pop()
        self.finish_reason = "stop"

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self._tokenizer:  # bytes of a character that never came are shown as what they are
            whole = self._tokenizer.decode(self.tokens)
            if whole.startswith(self._text):
                self._text = whole

    def _show(self) -> str | None:
        if self._stream is None:
            return None
        end = len(self._text) if self.finish_reason else len(self._text) - self._held_back()
        shown, self._shown = self._text[self._shown : end], max(end, self._shown)
        return shown

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for size in range(min(self._longest - 1, len(self._text)), 0, -1):
            if any(s.startswith(self._text[-size:]) for s in self._config.stop):
                return size
        return 0
