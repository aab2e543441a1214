"""Text in, ids out, and back without half a character."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.errors import BundleError, RequestError
from twotower.runtime.tokenizer import IncrementalText, Tokenizer

with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_tokenizer_adds_its_own_special_tokens_and_leaves_them_out_of_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("héllo")
    assert ids[0] == 1
    assert tokenizer.decode([*ids, 2, 3]) == "héllo"
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode([9999]) == ""


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
@with_fixture
def test_pieces_are_whole_characters_and_add_up(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    decoder = IncrementalText(tokenizer)
    pieces = [decoder.push(t) for t in tokenizer.encode(text)[1:]]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.flush() == text
    assert decoder.flush() == ""


@given(ids=st.lists(st.integers(0, 259), max_size=60))
@with_fixture
def test_any_bytes_add_up_to_the_text_of_all(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = IncrementalText(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_a_piece_shows_every_token(tokenizer: Tokenizer) -> None:
    h, *euro = tokenizer.encode("h€")[1:]
    assert tokenizer.piece(h) == "h"
    assert tokenizer.piece(2) == "</s>"
    assert all("\ufffd" not in tokenizer.piece(t) and tokenizer.piece(t) for t in euro), "parts of a character have names"
    assert tokenizer.piece(9999) == "9999"


def test_text_is_not_delayed_by_the_character_after_it(tokenizer: Tokenizer) -> None:
    decoder = IncrementalText(tokenizer)
    ids = tokenizer.encode("a€b")[1:]
    assert [decoder.push(t) for t in ids] == ["a", "", "", "€", "b"]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read"):
        Tokenizer.from_file(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer.from_file(tmp_path / "bad.json")


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("\ud800")


def test_the_runtime_does_not_import_the_library() -> None:
    code = "import sys, twotower.runtime; assert not {'tokenizers', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
