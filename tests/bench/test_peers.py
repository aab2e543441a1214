"""Peers: the same weights, the same tokens, and errors before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.bundles import built_tiny
from tests.helpers.commands import Commands
from twotower.bench.peers import measure_peer, open_peer
from twotower.builders import build_engines, builder_for
from twotower.bundle import Bundle
from twotower.calibration import builtin_recipes, plan_quantization, quantize_bundle
from twotower.errors import BundleError
from twotower.runtime import TwoTower

SHORT = "--prompt-tokens 4 --max-new-tokens 16 --runs 1"


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
def test_the_command_adds_the_peer(built_bundle: Path, cli: Commands) -> None:
    pytest.importorskip("transformers")
    (told,) = cli.json("bench", built_bundle, SHORT, "--peers transformers")["peers"]
    assert told["name"] == "transformers"
    assert told["equal_tokens"] == 1.0


@pytest.fixture(scope="module")
def few(built_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same, quantized and built."""
    bundle = Bundle.open(built_bundle)
    plan = plan_quantization(bundle, builtin_recipes()["int8-weights"])
    made = quantize_bundle(bundle, plan, tmp_path_factory.mktemp("few") / "few")
    build_engines(made, "ort-cpu", builder_for("ort-cpu"))
    return made


@pytest.mark.slow
def test_what_has_no_peer(built_bundle: Path, few: Bundle, cli: Commands) -> None:
    cli.refused("bench", built_bundle, SHORT, "--peers vllm", what="allowed: transformers")
    pytest.importorskip("transformers")
    with pytest.raises(BundleError, match="cannot run bundle"):
        open_peer("transformers", few, threads=1)


@pytest.mark.slow
def test_a_quantized_bundle_is_measured_beside_the_one_it_was_made_from(
    built_bundle: Path, few: Bundle, cli: Commands
) -> None:
    """Both in one run; the peer, which runs no quantized weights, runs the float one."""
    pytest.importorskip("transformers")
    words = f"bench {few.path} --beside {built_bundle} {SHORT.replace('16', '32')}"
    told = cli.json(words, "--peers transformers")
    beside = told["beside"]
    assert beside["bundle"] == str(built_bundle)
    ar, diffusion = told["ar"], told["diffusion"]
    assert beside["ar_to_ar"] == pytest.approx(
        ar["tokens_per_second"] / beside["ar"]["tokens_per_second"]
    )
    for name in ("pass", "extend"):
        ratio = beside["diffusion"][f"{name}_ms"] / diffusion[f"{name}_ms"]
        assert beside[f"{name}_to_{name}"] == pytest.approx(ratio)
    assert told["peers"][0]["name"] == "transformers"
    assert "this bundle is faster by: autoregression" in cli(words).out


def test_bundles_of_two_models(built_bundle: Path, tmp_path: Path, cli: Commands) -> None:
    other = built_tiny(tmp_path / "tiny")
    words = f"bench {built_bundle} --beside {other.path} {SHORT}"
    cli.refused(words, what="bundles of two models")
