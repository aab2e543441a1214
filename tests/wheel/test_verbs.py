"""Every verb with every extra that needs no GPU: it works, or names the extra it needs.

The table below says which; a new verb fails until it has its rows.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.environments import PARENTS, Environments, required
from tests.helpers.once import made_once, shared_folder
from tests.helpers.source import ROOT
from twotower import __version__
from twotower.cli.main import VERBS

pytestmark = [pytest.mark.wheel, pytest.mark.slow]

FIXTURE, TINY = ROOT / "tests" / "fixtures" / "hybrid-a", ROOT / "assets" / "twotower-tiny"
PROMPT = "Q: flip: a cat b dog c owl d fish\nA:"
PROBLEMS = "--kinds sums,flip --limit 2"
RUNS = PROBLEMS + " --thresholds 0.8 --steps 16"
SMALL = "--sm 89 --max-batch 1 --max-context 64 --no-cache"
WORKS = "works"
SINGLE = ("none", "cpu", "rtx", "export", "calibration", "evaluate")
EVERYWHERE = "works works works works works works"
WITH_CPU = "cpu works cpu cpu cpu cpu"
EXPORTING = "export export export export,cpu export,cpu export,cpu"
CALIBRATING = "calibration calibration calibration calibration,cpu calibration,cpu calibration,cpu"


@dataclass(frozen=True)
class Work:
    """A command and what its output shows when it has done its work.

    Attributes:
        command: {checkpoint} and {text} stand for checkpoints without and with a tokenizer,
            {bundle}, {tiny} and {few} for bundles of them, the last one quantized, {prompt} for a
            prompt, {prompts} for a file of some, {out} for an empty folder.
        shows: A part of what it prints.
        outcomes: What happens with each of SINGLE installed alone: it works, or names this extra.
    """

    command: str
    shows: str
    outcomes: str

    @property
    def verb(self) -> str:
        return self.command.split()[0]

    def words(self, **things: object) -> list[str]:
        return [word.format(prompt=PROMPT, **things) for word in shlex.split(self.command)]


WORK = {
    "inspect a checkpoint": Work("inspect {checkpoint}", "pattern", EVERYWHERE),
    "inspect a bundle": Work("inspect {bundle}", "ort-cpu: built", EVERYWHERE),
    "inspect a graph": Work(
        "inspect {bundle}/denoiser/model.onnx",
        "no issues found",
        "cpu works works works works works",
    ),
    "plan a config": Work("plan {checkpoint}/config.json", "this host", EVERYWHERE),
    "plan a checkpoint": Work("plan {checkpoint} --target ort-cpu", "this machine", EVERYWHERE),
    "plan a bundle": Work("plan {bundle} --gpu 'RTX 4090'", "RTX 4090", EVERYWHERE),
    "export": Work("export {checkpoint} -o {out}/new", "largest relative error", EXPORTING),
    "export unverified": Work(
        "export {text} -o {out}/new --no-verify",
        "not verified: not asked for",
        "export export export works works works",
    ),
    "calibrate": Work(
        "calibrate {tiny} --prompts {prompts} -o {out}/new --max-new-tokens 16",
        "1 prompts",
        CALIBRATING,
    ),
    "calibrate undrawn": Work(
        "calibrate {tiny} --prompts {prompts} -o {out}/new --max-new-tokens 16 --no-plot",
        "1 prompts",
        CALIBRATING,
    ),
    "quantize": Work(
        "quantize {tiny} --recipe int4-experts -o {out}/new",
        "int4 in groups of 32",
        "calibration calibration calibration works works works",
    ),
    "quantize by measuring": Work(
        "quantize {tiny} --recipe auto --formats int8 " + PROBLEMS + " -o {out}/new",
        "checked on the other half",
        CALIBRATING,
    ),
    "build for a CPU": Work("build {bundle} --target ort-cpu --force", "engines/ort-cpu", WITH_CPU),
    "build for RTX": Work(
        "build {bundle} --target rtx " + SMALL + " --force",
        "engines/rtx",
        "rtx rtx kernels rtx rtx rtx",
    ),
    "build for RTX, dense": Work(
        "build {bundle} --target rtx " + SMALL + " --experts dense",
        "engines/rtx",
        "rtx rtx works rtx rtx rtx",
    ),
    "generate": Work(
        "generate {tiny} {prompt} --max-new-tokens 32 --seed 0", "tokens a pass", WITH_CPU
    ),
    "trace": Work(
        "trace {tiny} {prompt} --max-new-tokens 32 --html {out}/new.html", "tokens a pass", WITH_CPU
    ),
    "evaluate": Work("evaluate {tiny} " + RUNS, "diffusion keeps", WITH_CPU),
    "evaluate with a page": Work(
        "evaluate {tiny} " + RUNS + " --html {out}/new.html",
        "new.png",
        "evaluate evaluate evaluate evaluate cpu cpu",
    ),
    "evaluate quantized": Work(
        "evaluate {few} --against {tiny} " + PROBLEMS + " --no-note",
        "routed_expert",
        "calibration calibration calibration cpu cpu cpu",
    ),
    "tune": Work("tune {tiny} " + RUNS + " -o {out}/new", "balanced", WITH_CPU),
    "doctor": Work("doctor", "reference answer", EVERYWHERE),
    "doctor of a bundle": Work(
        "doctor {bundle}", "output is independent of batch composition", WITH_CPU
    ),
    "bench": Work(
        "bench {bundle} --prompt-tokens 8 --max-new-tokens 16 --runs 1", "breaks even", WITH_CPU
    ),
    "bench an export": Work("bench --export --scratch {out}", "x the copy", EXPORTING),
}
TABLE = {name: tuple(work.outcomes.split()) for name, work in WORK.items()}
# What takes two extras to do, with exactly those that it names.
TOGETHER = {
    "export,cpu": ("export", "bench an export", "calibrate undrawn", "evaluate quantized"),
    "calibration,cpu": ("calibrate", "quantize by measuring"),
    "evaluate,cpu": ("evaluate with a page",),
    "kernels,rtx": ("build for RTX",),
}


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environments:
    return Environments(shared_folder(tmp_path_factory, "environments"), wheel)


@pytest.fixture(scope="module")
def things(
    tmp_path_factory: pytest.TempPathFactory, built_bundle: Path, tiny_bundle: Path
) -> dict[str, str]:
    """What the words stand for. The bundles are copies that `build for a CPU` may build again."""

    def make(folder: Path) -> None:
        for name, source in (("bundle", built_bundle), ("tiny", tiny_bundle)):
            shutil.copytree(source, folder / name)
        few = str(folder / "few")
        here(["quantize", str(folder / "tiny"), "--recipe", "int4-experts", "-o", few])
        here(["build", few, "--target", "ort-cpu"])
        (folder / "prompts").write_text(json.dumps({"text": PROMPT}) + "\n", encoding="utf-8")

    folder = made_once(tmp_path_factory, "things", make)
    return {
        "checkpoint": str(FIXTURE),
        "text": str(TINY),
        **{n: str(folder / n) for n in ("bundle", "tiny", "few", "prompts")},
    }


def here(words: list[str]) -> str:
    """Runs a command of this checkout, in this environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-m", "twotower.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_every_verb_has_its_rows() -> None:
    assert {work.verb for work in WORK.values()} == set(VERBS)
    assert {len(row) for row in TABLE.values()} == {len(SINGLE)}


@pytest.mark.parametrize("work", TABLE)
def test_following_the_advice_ends_at_an_environment_where_it_works(work: str) -> None:
    """Installs the named extra beside the last one, or in its place, until the work is done."""
    outcome = dict(zip(SINGLE, TABLE[work], strict=True))
    shown = [{extra} for extra in SINGLE if outcome[extra] == WORKS] + [
        set(e.split(",")) for e, works in TOGETHER.items() if work in works
    ]
    for start in SINGLE:
        extra = start
        for _ in SINGLE:
            if outcome[extra] == WORKS or any(
                e <= included(extra, *outcome[extra].split(",")) for e in shown
            ):
                break
            extra = outcome[extra]
            assert extra in outcome, (
                f"{work} with {start} ends at the advice to install {extra}, "
                "which is not shown to be enough"
            )


def included(*extras: str) -> set[str]:
    """Extras whose packages are there with some others, or with none."""
    out = {"none", *extras}
    for extra in extras:
        parent = PARENTS.get(extra)
        while parent:
            out.add(parent)
            parent = PARENTS.get(parent)
    return out


def among(extras: str) -> pytest.MarkDecorator:
    """Tests of one environment run in one process, beside those of another."""
    return pytest.mark.xdist_group(extras)


@pytest.mark.parametrize(
    "extras", [pytest.param(extras, marks=among(extras)) for extras in (*SINGLE, *TOGETHER)]
)
def test_an_environment_holds_what_the_wheel_asks_for_and_nothing_else(
    environments: Environments, extras: str
) -> None:
    installed = environments.installed(extras)
    assert set(installed) == required(installed, "twotower", frozenset(extras.split(",")))


@pytest.mark.parametrize(
    ("extras", "work", "outcome"),
    [
        pytest.param(extras, work, outcome, marks=among(extras))
        for extras, work, outcome in (
            *(
                (extra, work, row[i])
                for i, extra in enumerate(SINGLE)
                for work, row in TABLE.items()
            ),
            *((extras, work, WORKS) for extras, works in TOGETHER.items() for work in works),
        )
    ],
)
def test_a_verb_works_or_names_the_extra_it_needs(
    environments: Environments,
    things: dict[str, str],
    tmp_path: Path,
    extras: str,
    work: str,
    outcome: str,
) -> None:
    words = WORK[work].words(**things, out=tmp_path)
    done = environments.run(extras, *words)
    if outcome == WORKS:
        assert done.returncode == 0, done.stderr
        assert WORK[work].shows in done.stdout + done.stderr
        return
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        done.stdout == "" or WORK[work].verb == "doctor"
    )  # which first tells what it knows of the machine
    what, found, do = done.stderr.strip().splitlines()
    assert what.split(":")[0].endswith("Error")
    assert found.startswith("  found: ")
    assert do.startswith("  do: ")
    assert f"`pip install 'twotower[{outcome}]'`" in do
    assert not list(tmp_path.iterdir()), "something half-written was left behind"


@pytest.mark.parametrize("extras", [pytest.param(extras, marks=among(extras)) for extras in SINGLE])
def test_the_model_of_lm_evaluation_harness_is_there_or_names_its_extra(
    environments: Environments, extras: str
) -> None:
    done = environments.run_module(extras, "twotower.evaluate.lm_eval_model", "--help")
    if extras == "evaluate":
        assert done.returncode == 0, done.stderr
        assert "usage: " in done.stdout
        return
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 3
    assert "`pip install 'twotower[evaluate]'`" in done.stderr


@among("cpu")
@pytest.mark.parametrize("mode", ("diffusion", "ar"))
def test_the_text_is_the_same_wherever_it_is_generated(
    environments: Environments, things: dict[str, str], mode: str
) -> None:
    words = [*WORK["generate"].words(**things), "--mode", mode, "--json"]
    there, ours = json.loads(environments.run("cpu", *words).stdout), json.loads(here(words))
    assert (there["tokens"], there["usage"]) == (ours["tokens"], ours["usage"])
    assert len(there["tokens"]) > 16


@among("none")
def test_the_public_names_need_no_extra(environments: Environments) -> None:
    done = environments.run_code(
        "none", "from twotower import GenerationConfig, TwoTower, __version__; print(__version__)"
    )
    assert done.stdout.strip() == __version__, done.stderr


@among("export,cpu")
def test_doctor_checks_the_whole_chain_where_it_can(environments: Environments) -> None:
    assert (
        "not checked, it needs the extras `export` and `cpu`"
        in environments.run("cpu", "doctor").stdout
    )
    assert "ok      reference answer" in environments.run("export,cpu", "doctor").stdout
