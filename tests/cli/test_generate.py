"""`twotower generate` as it is typed: the same tokens by every way in, and every way out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import flip_byte
from tests.helpers.commands import Commands
from tests.helpers.graphs import FIXTURES

PROMPT = "--tokens '235 71 245'"
TWENTY = f"{PROMPT} --max-new-tokens 20 --ignore-eos"


def generated(cli: Commands, bundle: Path, words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cli("generate", bundle, words, "--json").out.splitlines()]


@pytest.mark.slow
def test_json_has_the_documented_keys(built_bundle: Path, cli: Commands) -> None:
    (one,) = generated(cli, built_bundle, f"{PROMPT} --max-new-tokens 20 --threshold 0.8")
    # No text: the fixture has no tokenizer.
    assert set(one) == {"tokens", "finish_reason", "mode", "seed", "usage", "timings_ms"}
    assert one["seed"] is None, "greedy"
    usage = one["usage"]
    names = {"prompt_tokens", "completion_tokens", "nfe", "blocks"}
    assert set(usage) == names | {"steps_per_block", "tokens_per_nfe"}
    assert set(one["timings_ms"]) == {"prefill", "denoise", "extend", "total"}
    assert usage["prompt_tokens"] == 3
    assert usage["completion_tokens"] == len(one["tokens"]) <= 20
    assert one["finish_reason"] in ("eos", "length")


@pytest.mark.slow
def test_a_drawn_seed_is_reported_and_gives_the_text_again(
    built_bundle: Path, tmp_path: Path, cli: Commands
) -> None:
    words = "--max-new-tokens 20 --ignore-eos --temperature 2"
    file = tmp_path / "p.jsonl"
    prompt = {"tokens": [235, 71, 245]}
    file.write_text("\n".join(json.dumps({**prompt, **own}) for own in ({}, {}, {"seed": 5})))
    first, second, given = generated(cli, built_bundle, f"{words} --prompt-file {file}")
    assert given["seed"] == 5
    assert first["seed"] != second["seed"]
    assert first["tokens"] != second["tokens"]
    for one in (first, second, given):
        assert one["seed"] < 2**53, "what JSON readers keep exactly"
        again = generated(cli, built_bundle, f"{words} {PROMPT} --seed {one['seed']}")
        assert [a["tokens"] for a in again] == [one["tokens"]]
    for way in ("", "--stream"):
        out, err = cli("generate", built_bundle, words, PROMPT, "--seed 5", way)
        assert out.split() == [str(t) for t in given["tokens"]]
        assert err.rstrip().endswith(", seed 5")


def test_golden_tokens_from_the_command_line(built_bundle: Path, cli: Commands) -> None:
    golden = json.loads((FIXTURES / "hybrid-a" / "golden.json").read_text())[0]
    options = golden["params"]
    prompt = ",".join(map(str, golden["prompt"]))
    flags = {
        "max-new-tokens": "max_new_tokens",
        "threshold": "confidence_threshold",
        "block-size": "block_size",
        "steps": "steps_per_block",
    }
    words = " ".join(f"--{flag} {options[name]}" for flag, name in flags.items())
    (one,) = generated(cli, built_bundle, f"--tokens {prompt} {words}")
    assert one["tokens"] == golden["diffusion_tokens"]
    assert one["usage"]["nfe"] == golden["nfe"]


def test_auto_names_the_mode_whose_text_it_is(built_bundle: Path, cli: Commands) -> None:
    (auto,) = generated(cli, built_bundle, f"{TWENTY} --mode auto")
    (own,) = generated(cli, built_bundle, f"{TWENTY} --mode {auto['mode']}")
    assert all(auto[key] == own[key] for key in ("tokens", "usage", "mode"))
    err = cli("generate", built_bundle, TWENTY, "--mode ar").err
    assert "-- 20 tokens (length), mode ar, 20 passes" in err
    cli.refused("generate", built_bundle, TWENTY, "--mode auto --top-p 0.5", what="top_p")


def test_plain_output_is_the_tokens_and_the_summary_goes_to_stderr(
    built_bundle: Path, cli: Commands
) -> None:
    (want,) = generated(cli, built_bundle, TWENTY)
    plain = cli("generate", built_bundle, TWENTY)
    assert plain.out == " ".join(map(str, want["tokens"])) + "\n"
    assert "-- 20 tokens (length)" in plain.err
    assert cli("generate", built_bundle, TWENTY, "--stream").out.split() == plain.out.split()
    (streamed,) = generated(cli, built_bundle, f"{TWENTY} --stream")
    assert streamed["tokens"] == want["tokens"]


def test_prompt_files_give_each_line_its_own_options(
    built_bundle: Path, tmp_path: Path, cli: Commands
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"tokens": [235, 71, 245]}\n\n{"tokens": [5], "max_new_tokens": 3, "mode": "ar"}\n'
    )
    words = f"--prompt-file {file} --max-new-tokens 20 --ignore-eos"
    first, second = generated(cli, built_bundle, words)
    (alone,) = generated(cli, built_bundle, TWENTY)
    assert first["tokens"] == alone["tokens"]
    assert (len(second["tokens"]), second["usage"]["blocks"]) == (3, 0)
    assert second["timings_ms"]["denoise"] == 0
    lines = cli("generate", built_bundle, words, "--stream").out.splitlines()
    assert {line[:3] for line in lines if line} == {"[0]", "[1]"}
    streamed = [t for line in lines if line.startswith("[0]") for t in line[3:].split()]
    assert list(map(int, streamed)) == first["tokens"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--tokens '5 x'", "not a list of numbers"),
        ("--tokens '5 999999'", "999999"),
        ("--tokens -4", "-4"),
        ("'some text'", "tokenizer"),
        ("--tokens 5 --max-new-tokens 0", "max_new_tokens"),
        ("--tokens 5 --max-new-tokens -3", "max_new_tokens"),
        ("--tokens 5 --block-size 32", "--allow-untrained-block-size"),
        ("--tokens 5 --block-size 0", "block_size"),
        ("--tokens 5 --threshold 2", "confidence_threshold"),
        ("--tokens 5 --temperature -1", "temperature"),
        ("--tokens 5 --top-p 0.5", "top_p"),
        ("--tokens 5 --stop x", "tokenizer"),
        ("--tokens 5 --max-context 8 --max-new-tokens 64", "8"),
        (f"--tokens '{'5 ' * 60}' --max-context 48 --max-new-tokens 8", "48"),
        ("--tokens 5 --target rtx", "rtx"),
        ("--tokens 5 --target toaster", "toaster"),
        ("--tokens 5 --devices 0", "uses no GPU"),
        ("--prompt-file nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_requests_that_cannot_be_served(
    built_bundle: Path, cli: Commands, words: str, what: str
) -> None:
    cli.refused("generate", built_bundle, words, what=what)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no prompts"),
        ("{", "line 1 is not JSON"),
        ("[5]", "not one prompt"),
        ('{"text": "a", "tokens": [5]}', "not one prompt"),
        ('{"tokens": ["a"]}', "neither text nor a list"),
        ('{"tokens": [true]}', "neither text nor a list"),
        ('{"tokens": [5]}\n{"tokens": [5], "treshold": 1}', "treshold"),
        ('{"tokens": [5], "max_new_tokens": "many"}', "max_new_tokens"),
    ],
)
def test_prompt_files_that_cannot_be_served(
    built_bundle: Path, tmp_path: Path, cli: Commands, text: str, what: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    cli.refused("generate", built_bundle, "--prompt-file", file, what=what)


def truncate(folder: Path) -> None:
    os.truncate(folder / "engines" / "ort-cpu" / "context.onnx", 1000)


def change(file: str, part: str, **values: Any) -> Callable[[Path], None]:
    """What changes fields of a JSON file, of a part of it unless that is the empty string."""

    def changed(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (data[part] if part else data).update(values)
        (folder / file).write_text(json.dumps(data))

    return changed


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_byte(next(folder.glob("denoiser/*.data"))),
        truncate,
        change("engines/ort-cpu/build.json", "library", version="0.0.1"),
        change("bundle.json", "", schema=999),
        change("bundle.json", "files", **{"../../etc/passwd": {"size": 1, "sha256": "0" * 64}}),
    ],
    ids=["flipped byte", "truncated engine", "another library", "schema", "path leading out"],
)
def test_damaged_bundles_are_refused(
    built_bundle: Path, tmp_path: Path, cli: Commands, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(built_bundle, tmp_path / "bundle"))
    damage(folder)
    cli.refused("generate", folder, "--tokens 5", what="")
