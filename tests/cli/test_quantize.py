"""The commands from a float bundle to a quantized one and its price, as they are typed, and what they say of bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import check_error
from twotower.bundle import MANIFEST_FILE, Bundle
from twotower.cli.expert_words import expert_words
from twotower.cli.main import main


def prompt_file(folder: Path, count: int = 3) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text(
        "".join(
            json.dumps({"text": f"Q: flip: {'a b ' * (i + 1)}\nA:"}) + "\n" for i in range(count)
        )
    )
    return file


@pytest.mark.trained
@pytest.mark.slow
def test_from_prompts_to_a_report(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats, few, page = tmp_path / "stats", tmp_path / "q4", tmp_path / "q4.html"
    calibrate = [
        "calibrate",
        str(tiny_bundle),
        "--prompts",
        str(prompt_file(tmp_path)),
        "-o",
        str(stats),
        "--max-new-tokens",
        "32",
    ]
    assert main(calibrate) == 0
    assert {p.name for p in stats.iterdir()} == {
        "statistics.json",
        "statistics.safetensors",
        "ranges.svg",
        "ranges.png",
    }
    assert "3 prompts" in capsys.readouterr().out
    assert main(["quantize", str(tiny_bundle), "--recipe", "int4-experts", "-o", str(few)]) == 0
    out = capsys.readouterr()
    assert "int4 in groups of 32" in out.out and "twotower build" in out.err
    assert main(["build", str(few), "--target", "ort-cpu"]) == 0
    capsys.readouterr()
    evaluate = [
        "evaluate",
        str(few),
        "--against",
        str(tiny_bundle),
        "--html",
        str(page),
        "--limit",
        "2",
    ]
    assert main(evaluate) == 0
    shown = capsys.readouterr().out
    assert "routed_expert" in shown and "passes/block" in shown
    assert (
        page.is_file()
        and page.with_suffix(".json").is_file()
        and page.with_suffix(".png").is_file()
    )
    measured = Bundle.open(few).quantization
    assert measured is not None and measured["measured"]["suite"]["problems"] == 14
    assert main(["generate", str(few), "Q: flip: a b\nA:"]) == 0
    assert "warning" not in capsys.readouterr().err

    # A budget that cannot be kept: the exit code says so, the manifest keeps it, and who generates
    # is told.
    strict = [
        "evaluate",
        str(few),
        "--against",
        str(tiny_bundle),
        "--limit",
        "1",
        "--no-sensitivity",
        "--budget",
        "100.5",
        "--json",
    ]
    assert main(strict) == 3
    assert json.loads(capsys.readouterr().out)["flags"]
    assert main(["generate", str(few), "Q: flip: a b\nA:"]) == 0
    assert "warning: this quantized bundle keeps" in capsys.readouterr().err
    assert main(["inspect", str(few)]) == 0
    assert "int4-experts" in capsys.readouterr().out


@pytest.mark.trained
@pytest.mark.slow
def test_auto_writes_what_it_chose(
    tiny_bundle: Path, tiny_statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "auto"
    command = [
        "quantize",
        str(tiny_bundle),
        "--recipe",
        "auto",
        "--budget",
        "90",
        "--stats",
        str(tiny_statistics),
        "-o",
        str(output),
    ]
    assert main([*command, "--limit", "4", "--max-new-tokens", "48", "--max-inflation", "20"]) == 0
    out = capsys.readouterr().out
    assert "checked on the other half" in out
    facts = Bundle.open(output).quantization
    assert facts is not None and facts["recipe"]["name"] == "auto"
    assert facts["chosen"]["alone"] and facts["measured"]["budget"]["percent"] == 90
    assert [p.name for p in tmp_path.iterdir()] == ["auto"], "what was tried is gone"


def test_what_tensorrt_makes_of_experts_is_told(
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kernels read every format; dense engines expand some."""
    expanded = "--experts dense expands them in memory in every pass"
    for recipe, slower in (
        ("int8-weights", True),
        ("nvfp4-experts", True),
        ("mixed", False),
        ("int4-experts", False),
    ):
        assert main(["quantize", str(tiny_bundle), "--recipe", recipe, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert (expanded in out) == slower, recipe
        how = "int8" if recipe == "int8-weights" else "nvfp4" if recipe.startswith("nv") else "int4"
        assert f"on rtx, trt    kernels read experts in {how} as they are stored" in out
        assert "rounds" not in out


def test_inputs_that_kernels_do_not_round_are_told() -> None:
    few = dict.fromkeys(("attention", "routed_expert", "shared_expert"), "int8")
    told = list(expert_words({"weights": few, "activations": list(few)}, "bfloat16"))
    assert [label for label, _ in told] == ["on rtx, trt", "", "dense there"]
    assert "the inputs of experts stay bfloat16, which this recipe rounds elsewhere" in told[1][1]
    assert told[2][1] == "--experts dense rounds the inputs of experts too"
    assert not list(expert_words({"weights": {"attention": "int8"}, "activations": []}, "bfloat16"))


def test_inspect_tells_it_too(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(few)]) == 0
    out = capsys.readouterr().out
    assert "on rtx, trt: kernels read experts in int8 as they are stored, from SM 80 on" in out
    assert "rounds" not in out
    manifest = few / MANIFEST_FILE
    facts = json.loads(manifest.read_text())
    facts["quantization"]["recipe"] |= {
        "weights": {"routed_expert": "int8"},
        "activations": ["routed_expert"],
    }
    manifest.write_text(json.dumps(facts))
    assert main(["inspect", str(few)]) == 0
    assert "the inputs of experts stay float32" in capsys.readouterr().out


def test_a_group_that_no_kernel_tiles_is_not_offered(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(tiny_bundle), "--recipe", "int4-experts", "--group", "96", "--dry-run"]
    assert main(words) == 2
    err = capsys.readouterr().err
    check_error(err, "has a group that the kernels of experts do not take")
    assert "128, 64, 32" in err


def test_a_dry_run_writes_nothing(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny_bundle), "--recipe", "mixed", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["weight_bytes"] < 0.4 * facts["weight_bytes_before"]
    assert main(["quantize", str(tiny_bundle), "--recipe", "mixed", "--dry-run"]) == 0
    assert "dry run: mixed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_calibration_as_json_without_a_picture(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = prompt_file(tmp_path)
    command = [
        "calibrate",
        str(tiny_bundle),
        "--prompts",
        str(file),
        "-o",
        str(tmp_path / "s"),
        "--no-plot",
        "--json",
        "--limit",
        "1",
    ]
    assert main([*command, "--max-new-tokens", "16"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompts"] == 1 and facts["inputs"]["denoiser"] == 25
    assert {p.name for p in (tmp_path / "s").iterdir()} == {
        "statistics.json",
        "statistics.safetensors",
    }


@pytest.mark.parametrize(
    ("content", "what"),
    [("", "has no prompts"), ("\n\n", "has no prompts"), ("not json\n", "line 1 is not JSON"), ('{"text": 3}\n', "neither text nor"),
     ('{"text": "a"}\n{"both": 1}\n', "line 2 is not one prompt"), ('{"tokens": [1, 99999]}\n', "99999")],
)  # fmt: skip
def test_bad_prompt_files(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, what: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    assert (
        main(["calibrate", str(tiny_bundle), "--prompts", str(file), "-o", str(tmp_path / "stats")])
        == 2
    )
    check_error(capsys.readouterr().err, what)
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.fixture
def few(tiny_bundle: Path, tmp_path: Path) -> Path:
    assert (
        main(
            ["quantize", str(tiny_bundle), "--recipe", "int8-weights", "-o", str(tmp_path / "few")]
        )
        == 0
    )
    return tmp_path / "few"


def test_a_quantized_bundle_is_neither_quantized_nor_calibrated_again(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.relative_to(few) for p in few.rglob("*"))
    for command in (
        ["quantize", str(few), "--recipe", "mixed", "-o", str(tmp_path / "twice")],
        ["quantize", str(few), "--recipe", "auto", "-o", str(tmp_path / "twice")],
        [
            "calibrate",
            str(few),
            "--prompts",
            str(prompt_file(tmp_path)),
            "-o",
            str(tmp_path / "stats"),
        ],
    ):
        capsys.readouterr()
        assert main(command) == 2
        check_error(capsys.readouterr().err, "is quantized already")
    assert sorted(p.relative_to(few) for p in few.rglob("*")) == before
    assert not (tmp_path / "twice").exists() and not (tmp_path / "stats").exists()


def arguments(*words: str) -> list[str]:
    return list(words)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (arguments("--recipe", "int5", "-o", "OUT"), "there is no recipe 'int5'"),
        (arguments("--recipe", "mixed"), "no folder to write to"),
        (arguments("--recipe", "mixed", "-o", "THERE"), "exists already"),
        (arguments("--recipe", "int8", "-o", "OUT"), "needs their ranges"),
        (arguments("--recipe", "int8", "--stats", "NONE", "-o", "OUT"), "holds no statistics"),
        (arguments("--recipe", "mixed", "--group", "48", "-o", "OUT"), "group"),
        (
            arguments("--recipe", "mixed", "--group", "128", "-o", "OUT"),
            "cannot be divided into groups of 128",
        ),
        (arguments("--recipe", "mixed", "--rounding", "up", "-o", "OUT"), "--rounding cannot be"),
        (arguments("--recipe", "auto", "--formats", "int2", "-o", "OUT"), "a format there is not"),
    ],
)
def test_what_cannot_be_done_is_said_in_three_parts(
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    what: str,
) -> None:
    (tmp_path / "there").mkdir()
    places = {
        "OUT": str(tmp_path / "out"),
        "THERE": str(tmp_path / "there"),
        "NONE": str(tmp_path / "none"),
    }
    assert main(["quantize", str(tiny_bundle), *(places.get(word, word) for word in words)]) == 2
    check_error(capsys.readouterr().err, what)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
def test_statistics_of_another_checkpoint(
    built_bundle: Path, tiny_statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "quantize",
        str(built_bundle),
        "--recipe",
        "int8",
        "--stats",
        str(tiny_statistics),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    check_error(capsys.readouterr().err, "are of another checkpoint")


def test_a_range_that_is_not_a_number(
    tiny_bundle: Path, tiny_statistics: Path, tmp_path: Path, capsys: Any
) -> None:
    from safetensors.numpy import load_file, save_file

    from twotower.bundle import hash_file

    folder = tmp_path / "stats"
    shutil.copytree(tiny_statistics, folder)
    arrays = load_file(folder / "statistics.safetensors")
    arrays["denoiser.maximum"][3, :] = float("nan")
    save_file(arrays, folder / "statistics.safetensors")
    described = json.loads((folder / "statistics.json").read_text())
    described["data"]["sha256"] = hash_file(folder / "statistics.safetensors")
    (folder / "statistics.json").write_text(json.dumps(described))
    assert (
        main(
            [
                "quantize",
                str(tiny_bundle),
                "--recipe",
                "int8",
                "--stats",
                str(folder),
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    check_error(capsys.readouterr().err, "a range that is not a number")
