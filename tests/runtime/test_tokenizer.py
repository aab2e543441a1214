"""Text in, ids out, and back without half a character."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from tests.helpers.bundles import TRUNCATED_AND_PADDED
from twotower.errors import BundleError, RequestError
from twotower.runtime.tokenizer import IncrementalText, Tokenizer

with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_tokenizer_adds_its_own_special_tokens_and_leaves_them_out_of_text(
    tokenizer: Tokenizer,
) -> None:
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
    assert all("\ufffd" not in tokenizer.piece(t) and tokenizer.piece(t) for t in euro), (
        "parts of a character have names"
    )
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


def processed(tokenizer_file: Path, post_processor: Any) -> Tokenizer:
    """The tokenizer with another post-processor."""
    data = json.loads(tokenizer_file.read_text())
    backend = Backend.from_str(json.dumps({**data, "post_processor": None}))
    if post_processor is not None:
        backend.post_processor = post_processor
    return Tokenizer(backend)


def test_a_typed_bos_is_the_only_one(tokenizer: Tokenizer) -> None:
    a, space = tokenizer.encode("a")[1], tokenizer.encode(" ")[1]
    assert tokenizer.encode("<s>") == [1]
    assert tokenizer.encode("<s>a") == tokenizer.encode("a") == [1, a]
    assert tokenizer.encode("<s><s>a") == [1, 1, a], "only what was added goes"
    assert tokenizer.encode("a<s>") == [1, a, 1]
    assert tokenizer.encode(" <s>") == [1, space, 1]
    assert tokenizer.encode("</s>a") == [1, 2, a]


def test_a_typed_bos_under_other_rules(tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    a = tokenizer.encode("a")[1]
    template = processors.TemplateProcessing
    names = [("<s>", 1), ("</s>", 2)]
    chain = [processors.ByteLevel(), template(single="<s> $A", special_tokens=names)]
    for rule, text, ids in (
        (None, "<s>a", [1, a]),
        (None, "<s><s>", [1, 1]),
        (processors.Sequence(chain), "<s>a", [1, a]),
        (template(single="<s> $A </s>", special_tokens=names), "<s>a</s>", [1, a, 2, 2]),
        (template(single="<s> $A </s>", special_tokens=names), "", [1, 2]),
        (template(single="$A </s>", special_tokens=names), "</s>", [2, 2]),
        (template(single="<s> </s> $A", special_tokens=names), "<s></s>a", [1, 2, a]),
    ):
        assert processed(tokenizer_file, rule).encode(text) == ids, (rule, text)


@pytest.mark.parametrize("setting", [*TRUNCATED_AND_PADDED, "dropout"])
def test_settings_of_a_training_do_not_change_a_prompt(
    tokenizer_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    data: dict[str, Any] = json.loads(tokenizer_file.read_text())
    text = "ab" * 20
    a, b = (data["model"]["vocab"][letter] for letter in text[:2])
    data["model"]["vocab"]["ab"] = len(data["model"]["vocab"])
    data["model"]["merges"] = [["a", "b"]]
    if setting == "dropout":
        data["model"]["dropout"] = 0.5
    else:
        data[setting] = TRUNCATED_AND_PADDED[setting]
    stored = tmp_path / "tokenizer.json"
    stored.write_text(json.dumps(data))
    with caplog.at_level(logging.INFO):
        opened = Tokenizer.from_file(stored)
    assert opened.encode(text) == [1] + [data["model"]["vocab"]["ab"]] * 20
    assert opened.encode("aab") == [1, a, data["model"]["vocab"]["ab"]]
    assert opened.encode("b" * 300) == [1] + [b] * 300
    said = [r.getMessage() for r in caplog.records if r.name == "twotower.runtime.tokenizer"]
    assert len(said) == 1
    assert setting in said[0]


def test_other_files_open_silently(tokenizer_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Tokenizer.from_file(tokenizer_file)
    assert not caplog.records


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("\ud800")


def test_the_runtime_does_not_import_the_library() -> None:
    code = (
        "import sys, twotower.runtime; "
        "assert not {'tokenizers', 'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
