"""Text to token ids and back, by the `tokenizers` library; piece by piece for streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twotower.errors import BundleError, RequestError

__all__ = ["TextStream", "Tokenizer"]


class Tokenizer:
    """A bundle's tokenizer.

    Raises:
        BundleError: the file is not a tokenizer.
        RequestError: the `tokenizers` library is not installed.
    """

    def __init__(self, file: Path) -> None:
        try:
            import tokenizers  # noqa: PLC0415 - token ids need no tokenizer
        except ImportError as e:
            raise RequestError("text needs the tokenizers library", found=str(e), do="`pip install tokenizers`, or use token ids") from e
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # noqa: BLE001 - the library raises bare Exception
            raise BundleError(f"{file} is not a tokenizer", found=str(e), do="export the checkpoint again with a sound tokenizer.json") from e
        self._stream_type: Any = tokenizers.decoders.DecodeStream

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids as the tokenizer's own post-processor makes them."""
        return tuple(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder for one growing text."""
        return TextStream(self._tokenizer, self._stream_type(skip_special_tokens=True))


class TextStream:
    """Decodes token by token; a character whose bytes are still coming is held back."""

    def __init__(self, tokenizer: Any, stream: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = stream

    def step(self, token: int) -> str:
        """The text this token completes, possibly empty."""
        return str(self._stream.step(self._tokenizer, token) or "")
