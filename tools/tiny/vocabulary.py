"""The tokenizer: a word of the problems is one token, all else goes by characters."""

from __future__ import annotations

import string

from tasks import WORDS
from tokenizers import Tokenizer, decoders, models, processors

__all__ = ["BOS", "EOS", "MASK", "PAD", "SIZE", "make_tokenizer"]

PAD, BOS, EOS, MASK = 0, 1, 2, 3
SIZE = 384
_SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
_GLUED = ['": "', '", "', '": ', ', "', '"}, {"', '[{"', '"}]', "Q:", "\nA:", "\n"]


def make_tokenizer() -> Tokenizer:
    """A unigram model whose scores make the longest pieces win."""
    pieces = [
        *_GLUED,
        *(f" {word}" for word in WORDS),
        *(f" {c}" for c in string.digits + string.ascii_lowercase),
    ]
    pieces += [w for w in ("age", "name", "city", "drink") if w not in pieces]
    pieces += [p for p in (*string.printable[:95], " spare") if p not in pieces]
    pieces = list(dict.fromkeys(pieces))
    assert len(_SPECIAL) + len(pieces) <= SIZE, f"{len(_SPECIAL) + len(pieces)} pieces"
    filler = [f"<unused{i}>" for i in range(SIZE - len(_SPECIAL) - len(pieces))]
    table = (
        [(token, 0.0) for token in _SPECIAL]
        + [(p, -10.0 - 0.1 / len(p)) for p in pieces]
        + [(f, -100.0) for f in filler]
    )
    tokenizer = Tokenizer(models.Unigram(table, unk_id=4))
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer
