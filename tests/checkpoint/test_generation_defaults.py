"""generation_config.json of a checkpoint: which fields count, and what cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import tiny_checkpoint
from tests.helpers.errors import check_error, fails
from tests.helpers.source import ROOT
from twotower.checkpoint.generation_defaults import read_defaults, read_eos_token_ids
from twotower.cli.main import main
from twotower.config import read_model_config
from twotower.errors import ConfigError
from twotower.export import Checkpoint

TINY = replace(
    read_model_config(ROOT / "assets" / "twotower-tiny" / "config.json"), eos_token_ids=(2, 5)
)


def written(folder: Path, content: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("value", "ids"),
    [(7, (7,)), ([2, 180], (2, 180)), ([180], (180,)), ([9, 2, 9], (9, 2)), (None, (2, 5))],
)
def test_a_number_or_a_list_counts_instead_of_the_model_s(
    tmp_path: Path, value: Any, ids: tuple[int, ...]
) -> None:
    assert read_eos_token_ids(written(tmp_path, {"eos_token_id": value}), TINY) == ids


def test_without_the_field_or_the_file_the_model_s_count(tmp_path: Path) -> None:
    assert read_eos_token_ids(tmp_path, TINY) == (2, 5)
    assert read_eos_token_ids(written(tmp_path, {"top_p": 0.9}), TINY) == (2, 5)


@pytest.mark.parametrize(
    "value",
    ["2", -1, TINY.vocab_size, True, 2.0, [], [2, "x"], [2, None], [[2]], {"id": 2}, [2, False]],
)
def test_what_is_no_token_is_named(tmp_path: Path, value: Any) -> None:
    with fails(ConfigError, found=(json.dumps(value), str(TINY.vocab_size - 1))):
        read_eos_token_ids(written(tmp_path, {"eos_token_id": value}), TINY)


@pytest.mark.parametrize("content", [[1], "x", 3, None])
def test_a_file_without_fields_is_named(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_defaults(written(tmp_path, content))


def test_export_refuses_it_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"eos_token_id": "</s>"}
    source = tiny_checkpoint(tmp_path / "checkpoint", generation_config=bad)
    assert main(["export", str(source), "-o", str(tmp_path / "bundle")]) == 2
    check_error(capsys.readouterr().err, "eos_token_id")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_ends_texts_where_both_files_say(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", generation_config={"eos_token_id": [2, 180]})
    assert Checkpoint.open(source).config.eos_token_ids == (2, 180)
