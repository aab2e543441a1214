"""Text to token ids and back, with the `tokenizers` library."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.errors import BundleError, RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

_UNKNOWN = "\ufffd"  # what a decoder writes for bytes that are not a character, or not one yet
_MOST_PENDING = 3  # bytes of an unfinished character; some decoders write one mark for each


def tokenizer_missing(what: str) -> RequestError:
    """The error of wanting text from a bundle without a tokenizer."""
    return RequestError(
        f"{what} needs a tokenizer",
        found="this bundle has none: its checkpoint came without tokenizer.json",
        do='give token ids instead (`--tokens "5 6 7"`, or a list of whole numbers), or export a '
        "checkpoint that has a tokenizer.json",
    )


class Tokenizer:
    """A loaded tokenizer; special tokens are added by its own rules and left out of text."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Loads a `tokenizer.json`.

        Its stored truncation, padding and BPE dropout are switched off: they are settings of
        whoever trained with the file last. Here the session owns the length of a prompt, and equal
        texts must give equal tokens.

        Raises:
            BundleError: the library is not installed, or the file is missing or not a tokenizer.
        """
        try:
            # only when opened: a run on token ids needs no library
            from tokenizers import Tokenizer as Backend  # noqa: PLC0415
        except ImportError as e:
            raise BundleError(
                f"cannot open {path}",
                found="the `tokenizers` library is not installed",
                do="`pip install tokenizers`",
            ) from e
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise BundleError(
                f"cannot read {path}", found=str(e), do="copy or export the bundle again"
            ) from e
        try:
            backend = Backend.from_str(text)
        except Exception as e:  # the library raises plain Exception for every fault of a file
            raise BundleError(
                f"{path} is not a tokenizer", found=str(e), do="copy or export the bundle again"
            ) from e
        stored = _switch_off_stored(backend)
        if stored:
            logger.info("%s: switched off stored %s", path, ", ".join(stored))
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds.

        What it adds in front (a BOS token) is left out where the text begins with the same.

        Raises:
            RequestError: the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise RequestError(
                "the prompt is not valid Unicode text",
                found=str(e),
                do="pass text decoded as UTF-8",
            ) from e
        encoding = self._backend.encode(text)
        ids, added = list(encoding.ids), encoding.special_tokens_mask
        front = added.index(0) if 0 in added else len(added)  # of a typed special token it is 0
        if ids[:front] == ids[front : 2 * front]:
            return ids[front:]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens and ids the tokenizer does not know give none."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        """One token for a reader: its text, or else its name, or else its number."""
        text = self.decode([token])
        if text and _UNKNOWN not in text:
            return text
        return str(self._backend.id_to_token(token) or token)


def _switch_off_stored(backend: Backend) -> list[str]:
    """Switches off stored settings that cut, pad or vary the tokens of a text; says which."""
    stored = []
    if backend.truncation is not None:
        stored.append(f"truncation to {backend.truncation.get('max_length')} tokens")
        backend.no_truncation()
    if backend.padding is not None:
        stored.append(f"padding to {backend.padding.get('length') or 'the longest'}")
        backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:  # BPE's: merges left out at random
        stored.append(f"dropout of {backend.model.dropout:g}")
        backend.model.dropout = None
    return stored


class IncrementalText:
    """Text of tokens that arrive one by one, never with half a character.

    A window of the last tokens is decoded again, because a token's text can depend on the one
    before it; it moves on at every token that ends on a whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._settled: list[int] = []  # their text is out; kept for what they mean to the next
        self._window: list[int] = []  # tokens after them
        self._before = 0  # characters of the settled tokens' text
        self._sent = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """The text that has become certain with this token, often its own, sometimes none."""
        self._window.append(token)
        text = self._window_text()
        pending = min(len(text) - len(text.rstrip(_UNKNOWN)), _MOST_PENDING)
        new = text[self._sent : len(text) - pending]
        if pending:
            self._sent += len(new)
        elif text:  # a token without text (a special one) says nothing to its successor
            self._settled, self._window, self._sent = self._window, [], 0
            self._before = len(self._tokenizer.decode(self._settled))
        return new

    def flush(self) -> str:
        """What is left at the end: marks for the bytes of a character that never came."""
        new = self._window_text()[self._sent :]
        self._sent += len(new)
        return new

    def _window_text(self) -> str:
        return self._tokenizer.decode(self._settled + self._window)[self._before :]
