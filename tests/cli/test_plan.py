"""`twotower plan` as it is typed: every kind of source, the table, and refusals a script can trust."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import Commands
from tests.helpers.source import ROOT
from twotower.calibration.recipes import builtin_recipes
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG, SyntheticOptions, write_checkpoint
from twotower.config.model import parse_model_config
from twotower.hardware import Gpu, Machine
from twotower.planning import GPUS, PlanOptions, describe_fits, describe_plan, fit, plan_bundle

TINY = ROOT / "assets" / "twotower-tiny"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No GPU and 8 GB, wherever the tests run."""
    monkeypatch.setattr(
        "twotower.hardware.probe_machine",
        lambda: Machine("test", 2, 8 * 10**9, (), {}, available=8 * 10**9),
    )
    return monkeypatch


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The published config.json alone; it is not JSON, for it holds `Infinity`."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED_CONFIG))
    assert "Infinity" in path.read_text()
    return path


def test_a_small_model_fits_every_gpu_rtx_lists(cli: Commands) -> None:
    out = cli("plan", TINY, "--target rtx").out
    assert out.count("  yes  ") == 3
    for word in ("rtx does not list SM 90", "exact ", "estimated ", "GiB"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            "--target trt",
            [
                *(f"\n{gpu.title}  " for gpu in GPUS),
                "63.2 billion",
                "--experts int4",
                "programs that hold no weights",
                "7.45 GiB of memory available: enough",
            ],
        ),
        (
            "--target rtx --experts int4 --expert-path dense",
            [
                "30.8 GiB of weights inside",
                "weights the bundle holds too: trt 30.8 GiB, rtx 30.8 GiB",
                "not enough for the build; see --max-build-memory",
            ],
        ),
        (
            "--target rtx --experts int4",
            ["9 engines for 49 programs", "7.45 GiB of memory available: enough"],
        ),
        (
            "--target trt --devices 4 --expert-path dense",
            ["3: 30.5 GiB  denoiser layers 27 to 51", "built with --segments 2"],
        ),
        (
            "--target rtx --expert-path dense --experts nvfp4 --gpu 'RTX PRO 6000'",
            ["54.7 GiB written and 54.7 GiB read besides, slower than bfloat16 experts"],
        ),
        (
            "--target ort-cuda --experts int4",
            [
                "one operator of ONNX Runtime a layer computes those that a token chose",
                "weights the bundle holds too: ort-cuda 27.4 GiB",
            ],
        ),
        ("--target ort-cpu", ["this machine  no", "experts     those that a token chose compute"]),
        ("--target trt --max-batch 32", ["the kernels of experts do not take so many rows"]),
    ],
)
def test_the_published_config_alone_gives_the_table(
    published: Path, cli: Commands, words: str, shown: list[str]
) -> None:
    out = cli("plan", published, words).out
    assert [text for text in shown if text not in out] == []


def test_what_is_not_told(published: Path, cli: Commands) -> None:
    """Cuts that no tower takes, and experts in memory where kernels read them as they are."""
    out = cli("plan", published, "--target trt --devices 4").out
    assert "denoiser layers 25 to 51" in out
    assert "--segments" not in out
    words = "--target rtx --experts nvfp4 --gpu 'RTX PRO 6000'"
    assert "expanded" not in cli("plan", published, words).out


def test_the_two_ways_to_compute_experts_are_told(published: Path, cli: Commands) -> None:
    said = {
        path: cli("plan", published, "--target trt --gpu H200 --expert-path", path).out
        for path in ("auto", "kernels", "dense")
    }
    assert said["auto"] == said["kernels"]
    assert "experts     kernels compute those that a token chose" in said["auto"]
    why = "all of them compute every token, because --expert-path dense asks for it"
    assert f"experts     dense: {why}" in said["dense"]
    assert "dense: memory" in said["auto"]
    assert "dense: memory" not in said["dense"]
    assert "E (1 - (1 - k/E)^N)" in said["auto"]
    assert "every pass reads all experts" in said["dense"]
    for text, pairs, passes in (
        (said["auto"], "68.6", "2.0 5.0 12.2"),
        (said["dense"], "128.0", "15.0 15.1 5.8"),
    ):
        assert f"denoising pass       16  {pairs:>7}" in text
        assert "diffusion breaks even with AR at N denoising passes a block of 16 tokens" in text
        assert f"H200 {passes}" in [" ".join(line.split()) for line in text.splitlines()]
    out = cli("plan", published, "--target trt --max-batch 32").out
    assert "*" in next(line for line in out.splitlines() if line.startswith("H200 "))


def test_json_holds_the_same(published: Path, cli: Commands) -> None:
    facts = cli.json("plan", published, "--target trt")
    assert {g["title"] for g in facts["gpus"] if g["fits"]} == {"2x H100 80GB", "H200", "B200"}
    assert round(facts["parameters"] / 1e9, 1) == 63.2
    assert facts["state"]["per_token"] == 6144
    assert facts["experts"] == {"name": "kernels", "why": ""}
    assert facts["passes"].keys() == facts["dense"].keys() == {"1", "8", "32"}
    step, dense = (facts[path]["8"]["ar_step"] for path in ("passes", "dense"))
    assert (round(step["experts"], 1), dense["experts"]) == (40.8, 128)
    assert step["nbytes"] < 0.4 * dense["nbytes"]
    (h200,) = (g for g in facts["gpus"] if g["title"] == "H200")
    assert {rows: round(n) for rows, n in h200["break_even"].items()} == {"1": 2, "8": 5, "32": 12}
    facts = cli.json("plan", published, "--target trt --expert-path dense")
    assert (facts["experts"]["name"], facts["dense"]) == ("dense", {})
    assert facts["expert_room"] == {"workspace": 0, "handed": 0, "shared": True}


def test_a_checkpoint_is_read_by_its_headers(tmp_path: Path, cli: Commands) -> None:
    """118 GB of it take no space here: the files are sparse."""
    folder = write_checkpoint(tmp_path / "c", PUBLISHED_CONFIG, SyntheticOptions(headers_only=True))
    facts = cli.json("plan", folder, "--target ort-cuda --gpu H200")
    size = facts["parameters"] * 2
    assert facts["disk"]["checkpoint"] == size == facts["options"]["checkpoint_bytes"]
    assert facts["host"]["build_peak"] == 0


def test_a_bundle_gives_its_own_dtype(built_bundle: Path, cli: Commands) -> None:
    facts = cli.json("plan", built_bundle, "--target rtx")
    assert (facts["dtype"], facts["options"]["block_size"]) == ("float32", 16)


@pytest.mark.parametrize("words", ["--gpu 'RTX 4090'", "--gpu H100", "--fit --max-batch 200"])
def test_what_does_not_fit_a_named_gpu_exits_with_2_and_says_what_does(
    published: Path, words: str, cli: Commands
) -> None:
    err = cli.refused("plan", published, "--target trt", words, what="does not fit")
    assert "--experts int4" in err
    assert "made by `twotower quantize --recipe int4-experts`" in err


def test_experts_that_a_pass_expands_are_told_and_not_recommended(
    published: Path, cli: Commands
) -> None:
    words = "--target rtx --expert-path dense --gpu all"
    assert cli.json("plan", published, words)["left_out"] == ["nvfp4"]
    out = cli("plan", published, words).out
    assert "left out    --experts nvfp4: rtx expands" in out
    assert "--experts nvfp4 " not in out.replace("left out    --experts nvfp4:", "")
    assert "`twotower quantize --recipe int8`" in out
    words = "--target ort-cuda --gpu H100"
    err = cli.refused("plan", published, words, "--expert-path dense", what="does not fit")
    assert "--experts" not in err.split("do:")[1].split("left out")[0]
    assert "left out: --experts int8, fp8, int4, nvfp4" in err
    err = cli.refused("plan", published, words, what="left out: --experts fp8, nvfp4")
    assert "`--experts int8`" in err
    assert "`--experts int4`" in err


def test_kernels_expand_no_experts_and_every_format_is_recommended(
    published: Path, cli: Commands
) -> None:
    """Of one card what would do is named, with its size: quantized experts, or two of them."""
    err = cli.refused("plan", published, "--target rtx --gpu 'RTX PRO 6000'", what="does not fit")
    for words in (
        "`--experts int8` 65.4 GiB",
        "`--experts fp8` 65.4 GiB",
        "`--experts int4` 41.4 GiB",
        "`--experts nvfp4` 41.4 GiB",
        "`--devices 2` 61.2 GiB",
    ):
        assert words in err
    assert "left out" not in err


@pytest.mark.parametrize(
    ("recipe", "expanded"), [("int8", False), ("int8-weights", True), ("mixed", False)]
)
def test_a_quantized_bundle_is_planned_with_what_its_products_read(
    built_bundle: Path, tmp_path: Path, recipe: str, expanded: bool, cli: Commands
) -> None:
    bundle = Path(shutil.copytree(built_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    made = {"name": recipe, **builtin_recipes()[recipe].to_json()}
    manifest["quantization"] = {"recipe": made, "measured": None, "formats": []}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    for path, moved in (("dense", expanded), ("auto", False)):
        facts = cli.json("plan", bundle, "--target rtx --expert-path", path)
        assert facts["left_out"] == []
        assert (facts["passes"]["8"]["denoising"]["expanded"] > 0) == moved


def test_a_gpu_at_hand_is_meant(
    machine: pytest.MonkeyPatch, published: Path, cli: Commands
) -> None:
    here = Machine("test", 2, 8 * 10**9, (Gpu("NVIDIA GeForce RTX 4090", 89, 24 * 10**9),), {})
    machine.setattr("twotower.hardware.probe_machine", lambda: here)
    cli.refused("plan", published, "--target trt", what="NVIDIA GeForce RTX 4090")
    cli("plan", published, "--target trt --gpu all")
    cli("plan", TINY, "--target trt")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--gpu 'GTX 480'", "RTX 5090"),
        ("--target tpu", "ort-cuda"),
        ("--target ort-cpu --gpu H200", "uses no GPU"),
        ("--target ort-cpu --fit", "does not fit"),
        ("--sm 90", "not Hopper (90)"),
        ("--gpu H200 --target rtx", "rtx does not list SM 90"),
        (
            "--experts int4 --expert-path dense --max-build-memory 1G",
            "a layer is the smallest piece",
        ),
        ("--expert-path chosen", "allowed: auto, kernels"),
        ("--expert-path kernels --target ort-cpu", "of rtx, trt and ort-cuda"),
    ],
)
def test_what_cannot_be_planned_names_what_can(
    published: Path, words: str, says: str, cli: Commands
) -> None:
    cli.refused("plan", published, words, what=says)
    cli("plan", TINY, "--target ort-cpu --fit")


def test_the_document_shows_what_the_command_prints() -> None:
    config, options = parse_model_config(PUBLISHED_CONFIG, "published"), PlanOptions(target="trt")
    plan = plan_bundle(config, options)
    shown = "\n".join([*describe_plan(plan), *describe_fits(plan, fit(config, options, GPUS))])
    assert f"```text\n{shown}\n```" in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
