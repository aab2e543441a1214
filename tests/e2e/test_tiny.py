"""The trained model that comes along: its checkpoint, its suite, and its answers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.source import ROOT
from twotower.cli.main import main
from twotower.evaluate.suite import judge, load_suite
from twotower.export import Checkpoint
from twotower.runtime import Request, TwoTower

ASSET = ROOT / "assets" / "twotower-tiny"
PROMPT = "Q: flip: a cat b red c lamp d owl e blue f kite g fox h bell i green j boat\nA:"
ANSWER = "j boat i green h bell g fox f kite e blue d owl c lamp b red a cat"


def test_the_checkpoint_is_small_and_has_the_published_layout() -> None:
    assert sum(f.stat().st_size for f in ASSET.iterdir()) <= 16_000_000
    checkpoint = Checkpoint.open(ASSET)
    assert set(checkpoint.config.pattern) == set("ME*")
    assert len({t.file for t in checkpoint.tensors.values()}) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "file"),
    [
        ("suite.py", "src/twotower/evaluate/data/suite.jsonl"),
        ("prompts.py", "assets/twotower-tiny-prompts.jsonl"),
    ],
)
def test_problems_and_prompts_are_what_their_tools_write(
    tmp_path: Path, tool: str, file: str
) -> None:
    """And so cannot drift away from the rule that keeps its problems out of the training."""
    made = tmp_path / "made.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "tiny" / tool), "--output", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    assert made.read_bytes() == (ROOT / file).read_bytes()


def test_no_prompt_to_calibrate_on_is_of_the_suite() -> None:
    lines = (ROOT / "assets" / "twotower-tiny-prompts.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["text"] for line in lines}
    assert len(prompts) > 100
    assert not prompts & {p.prompt for p in load_suite().problems}


@pytest.mark.slow
def test_training_never_draws_a_problem_of_the_suite() -> None:
    code = (
        "import json, random, sys; sys.path.insert(0, 'tools/tiny')\n"
        "from tasks import is_held_out\n"
        "for line in open('src/twotower/evaluate/data/suite.jsonl'):\n"
        "    question = json.loads(line)['prompt'].removeprefix('Q: ').removesuffix('\\nA:')\n"
        "    assert is_held_out(question), question\n"
        "from data import block_batch, sequence_batch\n"
        "from tasks import KINDS, LABELLED, draw\n"
        "rng = random.Random(1)\n"
        "for kind in [*KINDS, *LABELLED]:\n"
        "    for _ in range(50):\n"
        "        text = draw(rng, held_out=False, kind=kind).prompt\n"
        "        assert not is_held_out(text.removeprefix('Q: ').removesuffix('\\nA:')), text\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_both_modes_answer_and_diffusion_takes_far_fewer_passes(tiny_bundle: Path) -> None:
    """Seventy problems and loose bounds: `twotower evaluate` measures all, with intervals."""
    suite = load_suite().only(limit=10)
    with TwoTower.open(tiny_bundle, target="ort-cpu") as model:
        config = model.defaults
        assert config.mode == "diffusion"
        right, tokens, passes = {}, {}, {}
        for mode in ("ar", "diffusion"):
            options = type(config)(**{**config.to_json(), "mode": mode, "max_new_tokens": 160})
            results = model.generate([Request(p.prompt, options) for p in suite.problems])
            pairs = zip(suite.problems, results, strict=True)
            right[mode] = sum(judge(p, r.text or "", r.tokens).right for p, r in pairs)
            tokens[mode] = sum(r.usage.completion_tokens for r in results)
            passes[mode] = sum(r.usage.nfe for r in results)
    assert right["ar"] >= 0.9 * len(suite.problems)
    assert right["diffusion"] >= 0.95 * right["ar"]
    assert tokens["diffusion"] / passes["diffusion"] >= 3


def test_generate_speaks(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_bundle), PROMPT, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"].strip() == ANSWER
    assert result["finish_reason"] == "eos"
    assert main(["generate", str(tiny_bundle), PROMPT, "--mode", "ar"]) == 0
    assert capsys.readouterr().out.strip() == ANSWER
    assert main(["generate", str(tiny_bundle), PROMPT, "--stop", " c lamp"]) == 0
    assert capsys.readouterr().out.strip() == ANSWER.split(" c lamp")[0]


@pytest.mark.trained
@pytest.mark.slow
def test_evaluate_and_tune_work_on_it(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--limit", "6", "--thresholds", "0.6,0.9,0.98", "--steps", "16"]
    page = tmp_path / "report.html"
    bundle = str(tiny_bundle)
    assert main(["evaluate", bundle, *few, "--html", str(page), "--against", bundle]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    right = {name: run["total"]["right"] for name, run in report["settings"].items()}
    assert right["other"] == right["default"]
    assert report["other_to_default"]["total"]["retention"]["value"] == 100
    assert report["likelihood"]["greedy"] >= 90
    assert main(["tune", bundle, *few, "--budget", "80", "-o", str(tmp_path / "tuned")]) == 0
    out = capsys.readouterr().out
    assert "balanced" in out
    with TwoTower.open(tmp_path / "tuned", preset="fast") as model:
        assert (model.generate(PROMPT).text or "").strip().startswith("j boat")
        assert list(model._auto._record.times) == [16], "the record of this machine is taken"
        options = replace(model.defaults, mode="auto")
        result = model.generate(PROMPT, options)
        assert result.text == model.generate(PROMPT, replace(options, mode=result.mode)).text
