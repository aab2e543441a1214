"""The deploy side without the training side: by blocked imports (fast), and in an environment that never had them (slow)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.source import ROOT, imported_at_import, package_files
from twotower import __version__
from twotower.cli.main import VERBS

TRAINING = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "huggingface_hub")
VENDORS = ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "modelopt", "polygraphy")
FIRST_TOKENS = "5 17 42 99"
CHECKPOINT = str(ROOT / "tests" / "fixtures" / "hybrid-a")

# An import of a blocked name fails as if the distribution were not installed.
BLOCKER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python_without(blocked: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


def hardware_free(package: str) -> list[str]:
    """Modules of a package that import no optional library themselves."""
    optional = {*TRAINING, *VENDORS, "tokenizers"}
    # Reached only from a builder that has its libraries, or run as a program beside Polygraphy.
    apart = {f"twotower.builders.{name}" for name in ("child", "make_engine", "feed_graph", "expert_choice")}
    inside = {m: f for m, f in package_files().items() if f"{m}.".startswith(f"{package}.") and m not in apart}
    names = {m: set(imported_at_import(f)) for m, f in inside.items()}
    doors = {"twotower.onnx_runtime"}  # a library by another name
    return [m for m in inside if not names[m] & doors and not {name.split(".")[0] for name in names[m]} & optional]


def test_the_runtime_is_hardware_free_but_for_its_engines() -> None:
    every = {m for m in package_files() if m.startswith("twotower.runtime")}
    vendor = {m.rsplit(".", 1)[1] for m in every - set(hardware_free("twotower.runtime"))}
    assert vendor <= {"ort", "trt", "trt_rtx", "door"}


@pytest.mark.parametrize("package", ("twotower.runtime", "twotower.builders", "twotower.bundle", "twotower.cli"))
def test_the_deploy_side_imports_with_numpy_alone(package: str) -> None:
    modules = [m for m in hardware_free(package) if not m.endswith("__main__")]
    assert package in modules
    done = python_without((*TRAINING, *VENDORS, "tokenizers"), "import " + ", ".join(modules))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", (None, *VERBS))
def test_help_needs_nothing_heavy(verb: str | None) -> None:
    words = [*([verb] if verb else []), "--help"]
    done = python_without((*TRAINING, *VENDORS, "tokenizers", "numpy"), f"from twotower.cli.main import main; main({words!r})")
    assert done.returncode == 0, done.stderr
    assert f"usage: twotower {verb or ''}".rstrip() in done.stdout


def test_a_missing_library_is_an_error_that_names_its_extra(built_bundle: Path) -> None:
    words = ["generate", str(built_bundle), "--tokens", FIRST_TOKENS, "--target", "ort-cpu"]
    done = python_without((*TRAINING, "onnxruntime"), f"import sys; from twotower.cli.main import main; sys.exit(main({words!r}))")
    assert done.returncode == 2, done.stderr
    assert "twotower[cpu]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["export", "somewhere", "-o", "out"], "export"),
        (["calibrate", "somewhere", "--prompts", "p", "-o", "out"], "calibration"),
        (["quantize", "somewhere", "--recipe", "mixed", "-o", "out"], "calibration"),
        (["bench", "--export"], "export"),
    ],
)
def test_commands_of_the_training_side_name_their_extra(words: list[str], extra: str) -> None:
    done = python_without(TRAINING, f"import sys; from twotower.cli.main import main; sys.exit(main({words!r}))")
    assert done.returncode == 2, done.stderr
    assert f"twotower[{extra}]" in done.stderr
    assert "onnx_ir" in done.stderr
    assert "Traceback" not in done.stderr


AS_A_PROGRAM = "import runpy; runpy.run_module('twotower.evaluate.lm_eval_model', run_name='__main__')"


def test_the_model_of_lm_evaluation_harness_names_its_extra() -> None:
    done = python_without(("lm_eval",), AS_A_PROGRAM)
    assert done.returncode == 2, done.stderr
    what, found, do = done.stderr.splitlines()
    assert what.startswith("ConfigError: ")
    assert found == "  found: not installed: lm_eval"
    assert do == "  do: `pip install 'twotower[evaluate]'`"


def test_importing_the_model_of_lm_evaluation_harness_is_an_error_to_catch() -> None:
    code = "from twotower.errors import ConfigError\ntry: import twotower.evaluate.lm_eval_model\nexcept ConfigError as e: print(e.do)"
    assert "twotower[evaluate]" in python_without(("lm_eval",), code).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", CHECKPOINT], "checkpoint  "),
        (["inspect", "BUNDLE"], "bundle      "),
        (["plan", f"{CHECKPOINT}/config.json"], "engines "),
        (["plan", CHECKPOINT, "--target", "ort-cpu"], "engines "),
        (["plan", "BUNDLE"], "engines "),
        (["bench", "BUNDLE", "--prompt-tokens", "4", "--max-new-tokens", "16", "--runs", "1"], "breaks even"),
    ],
)
def test_what_only_reads_or_runs_needs_no_training_side(built_bundle: Path, words: list[str], expected: str) -> None:
    words = [str(built_bundle) if w == "BUNDLE" else w for w in words]
    done = python_without(TRAINING, f"import sys; from twotower.cli.main import main; sys.exit(main({words!r}))")
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel, its base dependencies and onnxruntime; returns its folder of commands."""
    folder = tmp_path_factory.mktemp("deployment")
    venv.create(folder, with_pip=True)
    commands = folder / ("Scripts" if sys.platform == "win32" else "bin")
    pip = [commands / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheel), "onnxruntime>=1.27"], check=True)
    return commands


def run_there(deployment: Path, *words: str) -> str:
    """Runs a command outside the repository: nothing of the checkout is on the path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([str(deployment / words[0]), *words[1:]], cwd=deployment, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_deployment_has_no_training_side(deployment: Path) -> None:
    unwanted = ("torch", "onnx", "onnx_ir", "transformers", "safetensors")
    code = f"import importlib.util as u; print(*[n for n in {unwanted!r} if u.find_spec(n)])"
    assert run_there(deployment, "python", "-c", code).split() == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("diffusion", "ar"))
def test_the_deployment_generates_the_same_tokens(deployment: Path, built_bundle: Path, mode: str) -> None:
    words = ("generate", str(built_bundle), "--tokens", FIRST_TOKENS, "--mode", mode, "--max-new-tokens", "20", "--ignore-eos", "--json")
    there = json.loads(run_there(deployment, "twotower", *words))
    here = subprocess.run(
        [sys.executable, "-m", "twotower.cli", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(there["tokens"]) == 20
    assert there["tokens"] == json.loads(here.stdout)["tokens"]
    assert there["usage"] == json.loads(here.stdout)["usage"]


@pytest.mark.slow
def test_the_deployment_has_the_public_names(deployment: Path) -> None:
    code = "from twotower import GenerationConfig, TwoTower, __version__; print(__version__)"
    assert run_there(deployment, "python", "-c", code).strip() == __version__
