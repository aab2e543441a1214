"""The deploy side without the training side, by blocked imports."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import run_python
from tests.helpers.source import ROOT, imported_at_import, package_files
from twotower.cli.main import VERBS

TRAINING = ("torch", "onnx", "onnx_ir", "onnxscript")
TRAINING += ("transformers", "safetensors", "huggingface_hub")
VENDORS = ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "modelopt", "polygraphy")
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
    return run_python("-c", f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}")


def twotower_without(blocked: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from twotower.cli.main import main; sys.exit(main({words!r}))"
    return python_without(blocked, code)


def hardware_free(package: str) -> list[str]:
    """Modules of a package that import no optional library themselves."""
    optional = {*TRAINING, *VENDORS, "tokenizers"}
    # Reached only from a builder that has its libraries, or run as a program beside Polygraphy.
    apart = ("build_plan", "child", "make_engine", "tensorrt_builder", "feed_graph")
    adapters = {"twotower.onnx_runtime"}  # a library by another name
    out = []
    for module, file in package_files().items():
        names = set(imported_at_import(file))
        free = not names & adapters and not {name.split(".")[0] for name in names} & optional
        if (
            f"{module}.".startswith(f"{package}.")
            and free
            and module.rpartition(".")[2] not in apart
        ):
            out.append(module)
    return out


def test_the_runtime_is_hardware_free_but_for_its_engines() -> None:
    every = {m for m in package_files() if m.startswith("twotower.runtime")}
    vendor = {m.rsplit(".", 1)[1] for m in every - set(hardware_free("twotower.runtime"))}
    assert vendor <= {"ort"}


@pytest.mark.parametrize(
    "package", ("twotower.runtime", "twotower.builders", "twotower.bundle", "twotower.cli")
)
def test_the_deploy_side_imports_with_numpy_alone(package: str) -> None:
    modules = [m for m in hardware_free(package) if not m.endswith("__main__")]
    assert package in modules
    done = python_without((*TRAINING, *VENDORS, "tokenizers"), "import " + ", ".join(modules))
    assert done.returncode == 0, done.stderr


def test_help_needs_nothing_heavy() -> None:
    code = f"""from twotower.cli.main import main
for words in {[["--help"], *([verb, "--help"] for verb in VERBS)]!r}:
    try: main(words)
    except SystemExit as e: assert not e.code, words"""
    done = python_without((*TRAINING, *VENDORS, "tokenizers", "numpy"), code)
    assert done.returncode == 0, done.stderr
    shown = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("usage: ")]
    assert shown[1:] == [["twotower", verb] for verb in VERBS]


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("generate BUNDLE --tokens 5 --target ort-cpu", "onnxruntime", "cpu"),
        ("export somewhere -o out", "onnx_ir", "export"),
        ("calibrate somewhere --prompts p -o out", "onnx_ir", "calibration"),
        ("quantize somewhere --recipe mixed -o out", "onnx_ir", "calibration"),
        ("bench --export", "onnx_ir", "export"),
    ],
)
def test_a_missing_library_is_an_error_that_names_its_extra(
    built_bundle: Path, command: str, missing: str, extra: str
) -> None:
    words = command.replace("BUNDLE", str(built_bundle)).split()
    done = twotower_without((*TRAINING, "onnxruntime"), *words)
    assert done.returncode == 2, done.stderr
    assert f"twotower[{extra}]" in done.stderr
    assert missing in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_model_of_lm_evaluation_harness_is_an_error_to_catch() -> None:
    code = """from twotower.errors import ConfigError
try: import twotower.evaluate.lm_eval_model
except ConfigError as e: print(e.do)"""
    assert "twotower[evaluate]" in python_without(("lm_eval",), code).stdout


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("inspect CHECKPOINT", "checkpoint  "),
        ("inspect BUNDLE", "bundle      "),
        ("plan CHECKPOINT/config.json", "engines "),
        ("plan CHECKPOINT --target ort-cpu", "engines "),
        ("plan BUNDLE", "engines "),
        ("bench BUNDLE --prompt-tokens 4 --max-new-tokens 16 --runs 1", "breaks even"),
    ],
)
def test_what_only_reads_or_runs_needs_no_training_side(
    built_bundle: Path, command: str, expected: str
) -> None:
    words = command.replace("BUNDLE", str(built_bundle)).replace("CHECKPOINT", CHECKPOINT).split()
    done = twotower_without(TRAINING, *words)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
