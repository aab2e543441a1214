"""Peers: the same weights, the same tokens, and errors before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.bundles import built_tiny
from twotower.bench.peers import measure_peer, open_peer
from twotower.builders import build_engines, builder_for
from twotower.bundle import Bundle
from twotower.calibration import builtin_recipes, plan_quantization, quantize_bundle
from twotower.cli.main import main
from twotower.errors import BundleError, ConfigError
from twotower.runtime import TwoTower


@pytest.fixture(scope="module")
def peer(built_bundle: Path) -> object:
    pytest.importorskip("transformers")
    return open_peer("transformers", Bundle.open(built_bundle), threads=1)


@pytest.mark.slow
def test_transformers_says_what_we_say(built_bundle: Path, peer: object) -> None:
    """Greedy, every layer kind, two rows; a different token would be a different model."""
    prompts = [[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]]
    with TwoTower.open(built_bundle, target="ort-cpu") as model:
        speed = measure_peer(model, peer, prompts, new_tokens=12, runs=1)  # type: ignore[arg-type]
    assert speed.equal_tokens == 1.0
    assert speed.ratio == pytest.approx(speed.ours / speed.tokens_per_second)
    assert speed.form.startswith("experts ")


@pytest.mark.slow
def test_the_command_adds_the_peer(built_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    words = [
        "bench",
        str(built_bundle),
        "--prompt-tokens",
        "4",
        "--max-new-tokens",
        "16",
        "--runs",
        "1",
        "--peers",
        "transformers",
    ]
    assert main([*words, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["peers"]
    assert told["name"] == "transformers"
    assert told["equal_tokens"] == 1.0


def test_an_unknown_peer(built_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["bench", str(built_bundle), "--runs", "1", "--max-new-tokens", "16", "--peers", "vllm"]
        )
        == 2
    )
    assert "allowed: transformers" in capsys.readouterr().err


def test_a_quantized_bundle_has_no_peer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bundle = built_tiny(tmp_path / "float")
    few = quantize_bundle(
        bundle, plan_quantization(bundle, builtin_recipes()["int8-weights"]), tmp_path / "few"
    )
    with pytest.raises(BundleError, match="cannot run bundle"):
        open_peer("transformers", few, threads=1)
    with pytest.raises(ConfigError, match="no peer 'x'"):
        open_peer("x", few, threads=1)


@pytest.mark.slow
def test_a_quantized_bundle_is_measured_beside_the_one_it_was_made_from(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both in one run; the peer, which has no few bits, runs the float one."""
    pytest.importorskip("transformers")
    bundle = Bundle.open(built_bundle)
    few = quantize_bundle(
        bundle, plan_quantization(bundle, builtin_recipes()["int8-weights"]), tmp_path / "few"
    )
    build_engines(few, "ort-cpu", builder_for("ort-cpu"))
    words = [
        "bench",
        str(few.path),
        "--beside",
        str(built_bundle),
        "--prompt-tokens",
        "4",
        "--max-new-tokens",
        "32",
        "--runs",
        "1",
    ]
    assert main([*words, "--peers", "transformers", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    beside = told["beside"]
    assert beside["bundle"] == str(built_bundle)
    assert beside["ar_to_ar"] == pytest.approx(
        told["ar"]["tokens_per_second"] / beside["ar"]["tokens_per_second"]
    )
    assert beside["pass_to_pass"] == pytest.approx(
        beside["diffusion"]["pass_ms"] / told["diffusion"]["pass_ms"]
    )
    assert beside["extend_to_extend"] == pytest.approx(
        beside["diffusion"]["extend_ms"] / told["diffusion"]["extend_ms"]
    )
    assert told["peers"][0]["name"] == "transformers"
    assert main(words) == 0
    assert "this bundle is faster by: autoregression" in capsys.readouterr().out


def test_bundles_of_two_models(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = built_tiny(tmp_path / "tiny")
    words = [
        "bench",
        str(built_bundle),
        "--beside",
        str(other.path),
        "--prompt-tokens",
        "4",
        "--max-new-tokens",
        "16",
        "--runs",
        "1",
    ]
    assert main(words) == 2
    assert "tokens in its vocabulary" in capsys.readouterr().err
