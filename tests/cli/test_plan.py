"""`twotower plan` as it is typed: every kind of source, the table, and refusals a script can trust."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.errors import check_error
from tests.helpers.source import ROOT
from twotower.calibration.recipes import builtin_recipes
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG, SyntheticOptions, write_checkpoint
from twotower.cli.main import main
from twotower.config.model import parse_model_config
from twotower.hardware import Gpu, Machine
from twotower.planning import GPUS, PlanOptions, describe_fits, describe_plan, fit, plan_bundle

TINY = str(ROOT / "assets" / "twotower-tiny")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No GPU and 8 GB, wherever the tests run."""
    monkeypatch.setattr(
        "twotower.hardware.probe_machine",
        lambda: Machine("test", 2, 8 * 10**9, (), {}, available=8 * 10**9),
    )
    return monkeypatch


@pytest.fixture
def published(tmp_path: Path) -> str:
    """The published config.json alone; it is not JSON, for it holds `Infinity`."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED_CONFIG))
    assert "Infinity" in path.read_text()
    return str(path)


def test_a_small_model_fits_every_gpu_rtx_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TINY, "--target", "rtx"]) == 0
    out = capsys.readouterr().out
    assert out.count("  yes  ") == 3
    assert "rtx does not list SM 90" in out
    for word in ("exact ", "estimated ", "GiB"):
        assert word in out


def test_the_published_config_alone_gives_the_table(
    published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", published, "--target", "trt"]) == 0
    out = capsys.readouterr().out
    for gpu in GPUS:
        assert f"\n{gpu.title}  " in out
    assert "63.2 billion" in out
    assert "--experts int4" in out
    assert "programs that hold no weights" in out
    assert "7.45 GiB of memory available: enough" in out


def test_a_build_that_this_host_has_no_memory_for_is_told(
    published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["plan", published, "--target", "rtx", "--experts", "int4", "--expert-path", "dense"])
        == 0
    )
    out = capsys.readouterr().out
    assert "30.8 GiB of weights inside" in out
    assert "weights the bundle holds too: trt 30.8 GiB, rtx 30.8 GiB" in out
    assert "not enough for the build; see --max-build-memory" in out
    assert main(["plan", published, "--target", "rtx", "--experts", "int4"]) == 0
    out = capsys.readouterr().out
    assert "9 engines for 49 programs" in out
    assert "programs that hold no weights" in out
    assert "7.45 GiB of memory available: enough" in out


def test_several_devices_are_told_with_the_cut_they_take(
    published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["plan", published, "--target", "trt", "--devices", "4", "--expert-path", "dense"])
        == 0
    )
    out = capsys.readouterr().out
    assert "3: 30.5 GiB  denoiser layers 27 to 51" in out
    assert "built with --segments 2" in out
    assert main(["plan", published, "--target", "trt", "--devices", "4"]) == 0
    out = capsys.readouterr().out
    assert "denoiser layers 25 to 51" in out
    assert "--segments" not in out


def test_the_two_ways_to_compute_experts_are_told(
    published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for path in ("auto", "kernels", "dense"):
        assert (
            main(["plan", published, "--target", "trt", "--gpu", "H200", "--expert-path", path])
            == 0
        )
        said[path] = capsys.readouterr().out
    assert said["auto"] == said["kernels"]
    assert "experts     kernels compute those that a token chose" in said["auto"]
    assert (
        "experts     dense: all of them compute every token, because --expert-path dense asks for it"
        in said["dense"]
    )
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
    assert main(["plan", published, "--target", "trt", "--max-batch", "32"]) == 0
    out = capsys.readouterr().out
    assert "because the kernels of experts do not take so many rows (--max-batch 32" in out
    assert "*" in next(line for line in out.splitlines() if line.startswith("H200 "))
    assert main(["plan", published, "--target", "ort-cpu"]) == 0
    assert "experts     those that a token chose compute, in the graph" in capsys.readouterr().out


def test_json_holds_the_same(published: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", published, "--target", "trt", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
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
    assert main(["plan", published, "--target", "trt", "--json", "--expert-path", "dense"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["experts"]["name"], facts["dense"], facts["expert_room"]) == (
        "dense",
        {},
        {"workspace": 0, "handed": 0, "shared": True},
    )


def test_a_checkpoint_is_read_by_its_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """118 GB of it take no space here: the files are sparse."""
    folder = write_checkpoint(tmp_path / "c", PUBLISHED_CONFIG, SyntheticOptions(headers_only=True))
    assert main(["plan", str(folder), "--target", "ort-cuda", "--gpu", "H200", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["disk"]["checkpoint"]
        == facts["parameters"] * 2
        == facts["options"]["checkpoint_bytes"]
    )
    assert facts["host"]["build_peak"] == 0


def test_a_bundle_gives_its_own_dtype(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(built_bundle), "--target", "rtx", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dtype"], facts["options"]["block_size"]) == ("float32", 16)


@pytest.mark.parametrize(
    "words", [["--gpu", "RTX 4090"], ["--gpu", "H100"], ["--fit", "--max-batch", "200"]]
)
def test_what_does_not_fit_a_named_gpu_exits_with_2_and_says_what_does(
    published: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", published, "--target", "trt", *words]) == 2
    out, err = capsys.readouterr()
    check_error(err, "does not fit")
    assert not out
    assert "--experts int4" in err
    assert "made by `twotower quantize --recipe int4-experts`" in err


def test_experts_that_a_pass_expands_are_told_and_not_recommended(
    published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = ["plan", published, "--target", "rtx", "--expert-path", "dense"]
    assert main([*dense, "--gpu", "all", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["left_out"] == ["nvfp4"]
    assert main([*dense, "--gpu", "all"]) == 0
    out = capsys.readouterr().out
    assert "left out    --experts nvfp4: rtx expands" in out
    assert "--experts nvfp4 " not in out.replace("left out    --experts nvfp4:", "")
    assert "`twotower quantize --recipe int8`" in out
    assert main([*dense, "--experts", "nvfp4", "--gpu", "RTX PRO 6000"]) == 0
    out = capsys.readouterr().out
    assert "54.7 GiB written and 54.7 GiB read besides, slower than bfloat16 experts" in out
    assert (
        main(["plan", published, "--target", "ort-cuda", "--gpu", "H100", "--expert-path", "dense"])
        == 2
    )
    err = capsys.readouterr().err
    check_error(err, "does not fit")
    assert "--experts" not in err.split("do:")[1].split("left out")[0]
    assert "left out: --experts int8, fp8, int4, nvfp4" in err
    assert main(["plan", published, "--target", "ort-cuda", "--gpu", "H100"]) == 2
    err = capsys.readouterr().err
    assert "`--experts int8`" in err
    assert "`--experts int4`" in err
    assert "left out: --experts fp8, nvfp4" in err
    assert main(["plan", published, "--target", "ort-cuda", "--experts", "int4"]) == 0
    out = capsys.readouterr().out
    assert "one operator of ONNX Runtime a layer computes those that a token chose" in out
    assert "weights the bundle holds too: ort-cuda 27.4 GiB" in out


def test_kernels_expand_no_experts_and_every_format_is_recommended(
    published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one card what would do is named, with its size: experts in few bits, or two of them."""
    assert main(["plan", published, "--target", "rtx", "--gpu", "RTX PRO 6000"]) == 2
    err = capsys.readouterr().err
    for words in (
        "`--experts int8` 65.4 GiB",
        "`--experts fp8` 65.4 GiB",
        "`--experts int4` 41.4 GiB",
        "`--experts nvfp4` 41.4 GiB",
        "`--devices 2` 61.2 GiB",
    ):
        assert words in err
    assert "left out" not in err
    assert (
        main(["plan", published, "--target", "rtx", "--experts", "nvfp4", "--gpu", "RTX PRO 6000"])
        == 0
    )
    assert "expanded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "expanded"), [("int8", False), ("int8-weights", True), ("mixed", False)]
)
def test_a_quantized_bundle_is_planned_with_what_its_products_read(
    built_bundle: Path,
    tmp_path: Path,
    recipe: str,
    expanded: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(built_bundle, bundle)
    manifest = json.loads((bundle / "bundle.json").read_text())
    made = builtin_recipes()[recipe]
    manifest["quantization"] = {
        "recipe": {"name": recipe, **made.to_json()},
        "measured": None,
        "formats": [],
    }
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    for path, moved in (("dense", expanded), ("auto", False)):
        assert main(["plan", str(bundle), "--target", "rtx", "--json", "--expert-path", path]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["left_out"] == []
        assert (facts["passes"]["8"]["denoising"]["expanded"] > 0) == moved


def test_a_gpu_at_hand_is_meant(
    machine: pytest.MonkeyPatch, published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Machine("test", 2, 8 * 10**9, (Gpu("NVIDIA GeForce RTX 4090", 89, 24 * 10**9),), {})
    machine.setattr("twotower.hardware.probe_machine", lambda: here)
    assert main(["plan", published, "--target", "trt"]) == 2
    check_error(capsys.readouterr().err, "NVIDIA GeForce RTX 4090")
    assert main(["plan", published, "--target", "trt", "--gpu", "all"]) == 0
    assert main(["plan", TINY, "--target", "trt"]) == 0


def test_a_cpu_is_held_against_its_memory(
    published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", published, "--target", "ort-cpu"]) == 0
    assert "this machine  no" in capsys.readouterr().out
    assert main(["plan", published, "--target", "ort-cpu", "--fit"]) == 2
    assert main(["plan", TINY, "--target", "ort-cpu", "--fit"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "GTX 480"], "RTX 5090"),
        (["--target", "tpu"], "ort-cuda"),
        (["--target", "ort-cpu", "--gpu", "H200"], "uses no GPU"),
        (["--sm", "90"], "not Hopper (90)"),
        (["--gpu", "H200", "--target", "rtx"], "rtx does not list SM 90"),
        (
            ["--experts", "int4", "--expert-path", "dense", "--max-build-memory", "1G"],
            "a layer is the smallest piece",
        ),
        (["--expert-path", "chosen"], "allowed: auto, kernels"),
        (["--expert-path", "kernels", "--target", "ort-cpu"], "of rtx, trt and ort-cuda"),
    ],
)
def test_what_cannot_be_planned_names_what_can(
    published: str, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", published, *words]) == 2
    err = capsys.readouterr().err
    check_error(err, "Error")
    assert says in err


def test_the_document_shows_what_the_command_prints() -> None:
    config, options = parse_model_config(PUBLISHED_CONFIG, "published"), PlanOptions(target="trt")
    plan = plan_bundle(config, options)
    shown = "\n".join([*describe_plan(plan), *describe_fits(plan, fit(config, options, GPUS))])
    assert f"```text\n{shown}\n```" in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
