"""`twotower generate` as it is typed: the same tokens by every way in, and every way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import check_error
from tests.helpers.graphs import FIXTURES
from twotower.cli.main import main

PROMPT = "235 71 245"


def generated(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["generate", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_json_has_the_documented_keys(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = generated(
        capsys,
        str(built_bundle),
        "--tokens",
        PROMPT,
        "--max-new-tokens",
        "20",
        "--threshold",
        "0.8",
    )
    # No text: the fixture has no tokenizer.
    assert set(one) == {"tokens", "finish_reason", "mode", "seed", "usage", "timings_ms"}
    assert one["seed"] is None, "greedy"
    assert set(one["usage"]) == {
        "prompt_tokens",
        "completion_tokens",
        "nfe",
        "blocks",
        "steps_per_block",
        "tokens_per_nfe",
    }
    assert set(one["timings_ms"]) == {"prefill", "denoise", "extend", "total"}
    assert one["usage"]["prompt_tokens"] == 3
    assert one["usage"]["completion_tokens"] == len(one["tokens"]) <= 20
    assert one["finish_reason"] in ("eos", "length")


def test_a_drawn_seed_is_told_and_gives_the_text_again(
    built_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(built_bundle), "--max-new-tokens", "20", "--ignore-eos", "--temperature", "2"]
    file = tmp_path / "p.jsonl"
    ids = [int(word) for word in PROMPT.split()]
    file.write_text("\n".join(json.dumps({"tokens": ids, **own}) for own in ({}, {}, {"seed": 5})))
    first, second, given = generated(capsys, *words, "--prompt-file", str(file))
    assert given["seed"] == 5
    assert first["seed"] != second["seed"]
    assert first["tokens"] != second["tokens"]
    for one in (first, second, given):
        assert one["seed"] < 2**53, "what JSON readers keep exactly"
        again = generated(capsys, *words, "--tokens", PROMPT, "--seed", str(one["seed"]))
        assert [a["tokens"] for a in again] == [one["tokens"]]
    for way in ([], ["--stream"]):
        assert main(["generate", *words, "--tokens", PROMPT, "--seed", "5", *way]) == 0
        captured = capsys.readouterr()
        assert captured.out.split() == [str(t) for t in given["tokens"]]
        assert captured.err.rstrip().endswith(", seed 5")


def test_golden_tokens_from_the_command_line(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = json.loads((FIXTURES / "hybrid-a" / "golden.json").read_text())[0]
    options = golden["params"]
    words = [
        "--max-new-tokens",
        str(options["max_new_tokens"]),
        "--threshold",
        str(options["confidence_threshold"]),
    ]
    words += [
        "--block-size",
        str(options["block_size"]),
        "--steps",
        str(options["steps_per_block"]),
    ]
    prompt = ",".join(map(str, golden["prompt"]))
    (one,) = generated(capsys, str(built_bundle), "--tokens", prompt, *words)
    assert one["tokens"] == golden["diffusion_tokens"]
    assert one["usage"]["nfe"] == golden["nfe"]


def test_autoregression_has_no_blocks(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = generated(
        capsys,
        str(built_bundle),
        "--tokens",
        PROMPT,
        "--mode",
        "ar",
        "--max-new-tokens",
        "5",
        "--ignore-eos",
    )
    assert len(one["tokens"]) == 5
    assert one["usage"]["blocks"] == 0
    assert one["timings_ms"]["denoise"] == 0


def test_auto_names_the_mode_whose_text_it_is(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(built_bundle), "--tokens", PROMPT, "--max-new-tokens", "20", "--ignore-eos"]
    (auto,) = generated(capsys, *words, "--mode", "auto")
    (own,) = generated(capsys, *words, "--mode", auto["mode"])
    assert (auto["tokens"], auto["usage"], own["mode"]) == (
        own["tokens"],
        own["usage"],
        auto["mode"],
    )
    assert main(["generate", *words, "--mode", "ar"]) == 0
    assert "-- 20 tokens (length), mode ar, 20 passes" in capsys.readouterr().err
    assert main(["generate", *words, "--mode", "auto", "--top-p", "0.5"]) == 2
    check_error(capsys.readouterr().err, "top_p")


def test_plain_output_is_the_tokens_and_the_summary_goes_to_stderr(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(built_bundle), "--tokens", PROMPT, "--max-new-tokens", "20", "--ignore-eos"]
    (want,) = generated(capsys, *words)
    assert main(["generate", *words]) == 0
    captured = capsys.readouterr()
    assert captured.out == " ".join(map(str, want["tokens"])) + "\n"
    assert "-- 20 tokens (length)" in captured.err
    assert main(["generate", *words, "--stream"]) == 0
    assert capsys.readouterr().out.split() == captured.out.split()
    (streamed,) = generated(capsys, *words, "--stream")
    assert streamed["tokens"] == want["tokens"]


def test_prompt_files_give_each_line_its_own_options(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"tokens": [235, 71, 245]}\n\n{"tokens": [5], "max_new_tokens": 3, "mode": "ar"}\n'
    )
    base = [str(built_bundle), "--prompt-file", str(file), "--max-new-tokens", "20", "--ignore-eos"]
    first, second = generated(capsys, *base)
    (alone,) = generated(
        capsys, str(built_bundle), "--tokens", PROMPT, "--max-new-tokens", "20", "--ignore-eos"
    )
    assert first["tokens"] == alone["tokens"]
    assert (len(second["tokens"]), second["usage"]["blocks"]) == (3, 0)
    assert main(["generate", *base, "--stream"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[:3] for line in lines if line} == {"[0]", "[1]"}
    assert [int(t) for line in lines if line.startswith("[0]") for t in line[3:].split()] == first[
        "tokens"
    ]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--tokens", "5 x"], "not a list of numbers"),
        (["--tokens", "5 999999"], "999999"),
        (["--tokens", "-4"], "-4"),
        (["some text"], "tokenizer"),
        (["--tokens", "5", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--tokens", "5", "--max-new-tokens", "-3"], "max_new_tokens"),
        (["--tokens", "5", "--block-size", "32"], "--allow-untrained-block-size"),
        (["--tokens", "5", "--block-size", "0"], "block_size"),
        (["--tokens", "5", "--threshold", "2"], "confidence_threshold"),
        (["--tokens", "5", "--temperature", "-1"], "temperature"),
        (["--tokens", "5", "--top-p", "0.5"], "top_p"),
        (["--tokens", "5", "--stop", "x"], "tokenizer"),
        (["--tokens", "5", "--max-context", "8", "--max-new-tokens", "64"], "8"),
        (["--tokens", "5", "--target", "rtx"], "rtx"),
        (["--tokens", "5", "--target", "toaster"], "toaster"),
        (["--prompt-file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_requests_that_cannot_be_served(
    built_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], what: str
) -> None:
    assert main(["generate", str(built_bundle), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    check_error(captured.err, what)


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
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, what: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    assert main(["generate", str(built_bundle), "--prompt-file", str(file)]) == 2
    check_error(capsys.readouterr().err, what)


def test_a_long_prompt_names_the_capacity(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokens", " ".join(["5"] * 60), "--max-context", "48", "--max-new-tokens", "8"]
    assert main(["generate", str(built_bundle), *words]) == 2
    check_error(capsys.readouterr().err, "48")


@pytest.mark.parametrize(
    "damage",
    [
        "flipped byte",
        "engine of another library",
        "truncated engine",
        "other schema",
        "path leading out",
    ],
)
def test_damaged_bundles_are_refused(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(built_bundle, folder)
    manifest, record = folder / "twotower.json", folder / "engines" / "ort-cpu" / "build.json"
    if not manifest.is_file():
        (manifest,) = folder.glob("*.json")
    facts, built = json.loads(manifest.read_text()), json.loads(record.read_text())
    if damage == "flipped byte":
        path = next(folder.glob("denoiser/*.data"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "engine of another library":
        built["library"]["version"] = "0.0.1"
    elif damage == "truncated engine":
        path = folder / "engines" / "ort-cpu" / "context.onnx"
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "other schema":
        facts["schema"] = 999
    else:
        facts["files"]["../../etc/passwd"] = {"size": 1, "sha256": "0" * 64}
    manifest.write_text(json.dumps(facts))
    record.write_text(json.dumps(built))
    assert main(["generate", str(folder), "--tokens", "5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    check_error(captured.err, "")


def test_gpus_for_a_target_that_uses_none_are_refused(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(built_bundle), "--tokens", PROMPT, "--devices", "0"]) == 2
    check_error(capsys.readouterr().err, "uses no GPU")
