"""From a float bundle to a quantized one and its measured impact, as it is typed; and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.commands import Commands
from twotower.bundle import MANIFEST_FILE, Bundle, hash_file
from twotower.cli.expert_words import expert_words

QUESTION = "'Q: flip: a b\nA:'"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    texts = (f"Q: flip: {'a b ' * (i + 1)}\nA:" for i in range(3))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.mark.trained
@pytest.mark.slow
def test_from_prompts_to_a_report(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, cli: Commands
) -> None:
    stats, few, page = tmp_path / "stats", tmp_path / "q4", tmp_path / "q4.html"
    out = cli(f"calibrate {tiny_bundle} --prompts {prompts} -o {stats} --max-new-tokens 32").out
    assert "3 prompts" in out
    names = {"statistics.json", "statistics.safetensors", "ranges.svg", "ranges.png"}
    assert {p.name for p in stats.iterdir()} == names
    out, err = cli(f"quantize {tiny_bundle} --recipe int4-experts -o {few}")
    assert "int4 in groups of 32" in out and "twotower build" in err
    cli(f"build {few} --target ort-cpu")
    shown = cli(f"evaluate {few} --against {tiny_bundle} --html {page} --limit 2").out
    assert "routed_expert" in shown and "passes/block" in shown
    assert all(page.with_suffix(f".{kind}").is_file() for kind in ("html", "json", "png"))
    measured = Bundle.open(few).quantization
    assert measured is not None and measured["measured"]["suite"]["problems"] == 14
    assert "warning" not in cli("generate", few, QUESTION).err

    # A budget that cannot be kept is in the exit code, in the manifest, and a warning.
    strict = f"evaluate {few} --against {tiny_bundle} --limit 1 --no-sensitivity --budget 100.5"
    assert cli.json(strict, code=3)["flags"]
    assert "warning: this quantized bundle keeps" in cli("generate", few, QUESTION).err
    assert "int4-experts" in cli("inspect", few).out


@pytest.mark.trained
@pytest.mark.slow
def test_auto_writes_what_it_chose(
    tiny_bundle: Path, tiny_statistics: Path, tmp_path: Path, cli: Commands
) -> None:
    output = tmp_path / "auto"
    words = f"--budget 90 --stats {tiny_statistics} --limit 4 --max-new-tokens 48"
    out = cli(f"quantize {tiny_bundle} --recipe auto -o {output} --max-inflation 20", words).out
    assert "checked on the other half" in out
    facts = Bundle.open(output).quantization
    assert facts is not None and facts["recipe"]["name"] == "auto"
    assert facts["chosen"]["alone"] and facts["measured"]["budget"]["percent"] == 90
    assert [p.name for p in tmp_path.iterdir()] == ["auto"], "what was tried is gone"


@pytest.mark.parametrize(
    ("recipe", "how", "slower"),
    [
        ("int8-weights", "int8", True),
        ("nvfp4-experts", "nvfp4", True),
        ("mixed", "int4", False),
        ("int4-experts", "int4", False),
    ],
)
def test_what_tensorrt_makes_of_experts_is_told(
    tiny_bundle: Path, cli: Commands, recipe: str, how: str, slower: bool
) -> None:
    """Kernels read every format; dense engines expand some."""
    out = cli(f"quantize {tiny_bundle} --recipe {recipe} --dry-run").out
    assert ("--experts dense expands them in memory in every pass" in out) == slower
    assert f"on rtx, trt    kernels read experts in {how} as they are stored" in out
    assert "rounds" not in out


def test_inputs_that_kernels_do_not_round_are_told() -> None:
    few = dict.fromkeys(("attention", "routed_expert", "shared_expert"), "int8")
    told = list(expert_words({"weights": few, "activations": list(few)}, "bfloat16"))
    assert [label for label, _ in told] == ["on rtx, trt", "", "dense there"]
    assert "the inputs of experts stay bfloat16, which this recipe rounds elsewhere" in told[1][1]
    assert told[2][1] == "--experts dense rounds the inputs of experts too"
    assert not list(expert_words({"weights": {"attention": "int8"}, "activations": []}, "bfloat16"))


def test_inspect_tells_it_too(few: Path, cli: Commands) -> None:
    out = cli("inspect", few).out
    assert "on rtx, trt: kernels read experts in int8 as they are stored, from SM 80 on" in out
    assert "rounds" not in out
    manifest = few / MANIFEST_FILE
    facts = json.loads(manifest.read_text())
    rounded = {"weights": {"routed_expert": "int8"}, "activations": ["routed_expert"]}
    facts["quantization"]["recipe"] |= rounded
    manifest.write_text(json.dumps(facts))
    assert "the inputs of experts stay float32" in cli("inspect", few).out


def test_a_dry_run_writes_nothing(tiny_bundle: Path, tmp_path: Path, cli: Commands) -> None:
    words = f"quantize {tiny_bundle} --recipe mixed --dry-run"
    facts = cli.json(words)
    assert facts["weight_bytes"] < 0.4 * facts["weight_bytes_before"]
    assert "dry run: mixed" in cli(words).out
    assert not list(tmp_path.iterdir())


def test_calibration_as_json_without_a_picture(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, cli: Commands
) -> None:
    words = f"-o {tmp_path / 's'} --no-plot --limit 1 --max-new-tokens 16"
    facts = cli.json(f"calibrate {tiny_bundle} --prompts {prompts}", words)
    assert facts["prompts"] == 1 and facts["inputs"]["denoiser"] == 25
    files = {"statistics.json", "statistics.safetensors"}
    assert {p.name for p in (tmp_path / "s").iterdir()} == files


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("\n\n", "has no prompts"),
        ('{"text": "a"}\n{"both": 1}\n', "line 2 is not one prompt"),
        ('{"tokens": [1, 99999]}\n', "99999"),
    ],
)
def test_bad_prompt_files(
    tiny_bundle: Path, prompts: Path, tmp_path: Path, cli: Commands, content: str, what: str
) -> None:
    prompts.write_text(content)
    words = f"calibrate {tiny_bundle} --prompts {prompts} -o {tmp_path / 'stats'}"
    cli.refused(words, what=what)
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.fixture
def few(tiny_bundle: Path, tmp_path: Path, cli: Commands) -> Path:
    cli(f"quantize {tiny_bundle} --recipe int8-weights -o {tmp_path / 'few'}")
    return tmp_path / "few"


def test_a_quantized_bundle_is_neither_quantized_nor_calibrated_again(
    few: Path, prompts: Path, tmp_path: Path, cli: Commands
) -> None:
    before = sorted(p.relative_to(few) for p in few.rglob("*"))
    for words in (
        "quantize B --recipe mixed -o T/twice",
        "quantize B --recipe auto -o T/twice",
        f"calibrate B --prompts {prompts} -o T/stats",
    ):
        command = words.replace("B", str(few)).replace("T", str(tmp_path))
        cli.refused(command, what="is quantized already")
    assert sorted(p.relative_to(few) for p in few.rglob("*")) == before
    assert not (tmp_path / "twice").exists() and not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--recipe int5 -o T/out", "there is no recipe 'int5'"),
        ("--recipe mixed", "no folder to write to"),
        ("--recipe mixed -o T/there", "exists already"),
        ("--recipe int8 -o T/out", "needs their ranges"),
        ("--recipe int8 --stats T/none -o T/out", "holds no statistics"),
        ("--recipe mixed --group 48 -o T/out", "group"),
        ("--recipe mixed --group 128 -o T/out", "cannot be divided into groups of 128"),
        ("--recipe mixed --rounding up -o T/out", "--rounding cannot be"),
        ("--recipe auto --formats int2 -o T/out", "a format there is not"),
        ("--recipe int4-experts --group 96 --dry-run", "128, 64, 32"),
    ],
)
def test_what_cannot_be_done_is_said_in_three_parts(
    tiny_bundle: Path, tmp_path: Path, cli: Commands, words: str, what: str
) -> None:
    (tmp_path / "there").mkdir()
    cli.refused("quantize", tiny_bundle, words.replace("T", str(tmp_path)), what=what)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
def test_statistics_of_another_checkpoint(
    built_bundle: Path, tiny_statistics: Path, tmp_path: Path, cli: Commands
) -> None:
    words = f"--recipe int8 --stats {tiny_statistics} -o {tmp_path / 'out'}"
    cli.refused("quantize", built_bundle, words, what="are of another checkpoint")


@pytest.mark.slow
def test_a_range_that_is_not_a_number(
    tiny_bundle: Path, tiny_statistics: Path, tmp_path: Path, cli: Commands
) -> None:
    folder = tmp_path / "stats"
    shutil.copytree(tiny_statistics, folder)
    arrays = load_file(folder / "statistics.safetensors")
    arrays["denoiser.maximum"][3, :] = float("nan")
    save_file(arrays, folder / "statistics.safetensors")
    described = json.loads((folder / "statistics.json").read_text())
    described["data"]["sha256"] = hash_file(folder / "statistics.safetensors")
    (folder / "statistics.json").write_text(json.dumps(described))
    words = f"--recipe int8 --stats {folder} -o {tmp_path / 'out'}"
    cli.refused("quantize", tiny_bundle, words, what="a range that is not a number")
