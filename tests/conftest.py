"""Fixtures and hooks of all tests; nothing imports from here.

The GPU is hidden before any library can look for it, unless TWOTOWER_REQUIRE asks for it (`make
test-gpu`).
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers.account import Account
from tests.helpers.commands import Commands
from tests.helpers.once import made_once
from tests.helpers.processes import run_python

ROOT = Path(__file__).parents[1]
CHECKPOINT, TINY = ROOT / "tests" / "fixtures" / "hybrid-a", ROOT / "assets" / "twotower-tiny"
REQUIRED = frozenset(filter(None, os.environ.get("TWOTOWER_REQUIRE", "").split(",")))
BROWSER = (("chromium", "google-chrome"), ("chromedriver",))
LIBRARY = {
    "trt": ("tensorrt",),
    "trt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx"),
    "ort_cuda": ("onnxruntime-gpu",),
}
"""Mark -> distributions, any of which will do: imports cannot tell onnxruntime's two apart."""

_WEIGHTS = {"trained": 10, "trt_rtx": 3, "slow": 3}
"""Seconds of a test with a mark, about."""

if "gpu" not in REQUIRED:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests import ONNX Runtime themselves, and start processes that do.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# torch's threads: small tensors gain nothing from more than two, and machines are shared, by
# processes of one run too
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

# Libraries of millions of objects are imported: looking through them took a quarter of the time.
gc.set_threshold(100_000, 20, 20)
settings.register_profile(
    "twotower", deadline=None, max_examples=25, derandomize="CI" in os.environ
)
settings.load_profile("twotower")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-limit",
        type=float,
        help="fail where a test that is not marked slow takes more seconds of a processor",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Account(config))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first, so that no process of a run is left with one at the end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    weights: dict[Path, float] = defaultdict(float)
    for item in items:
        weights[item.path] += 0.1 + sum(_WEIGHTS.get(mark.name, 0) for mark in item.iter_markers())
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_finish() -> None:
    """Modules are there for good: the collector need not look at them again."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests of hardware or a browser that is missing; TWOTOWER_REQUIRE makes them fail."""
    for mark in ("gpu", "browser", *LIBRARY):
        if item.get_closest_marker(mark) and (why := _missing(mark)):
            if mark in REQUIRED:
                pytest.fail(f"TWOTOWER_REQUIRE asks for {mark}, but {why}", pytrace=False)
            pytest.skip(why)


def _missing(mark: str) -> str | None:
    if mark in LIBRARY:
        found = any(map(_installed, LIBRARY[mark]))
        return None if found else f"{LIBRARY[mark][0]} is not installed"
    if mark == "browser":
        if not importlib.util.find_spec("selenium"):
            return "selenium is not installed"
        absent = [" or ".join(names) for names in BROWSER if not any(map(shutil.which, names))]
        told = f"there is no {' and no '.join(absent)}; `make browser` installs them"
        return told if absent else None
    if "gpu" not in REQUIRED:
        return "the GPU is hidden; `make test-gpu` shows it"
    from twotower.hardware import probe_machine

    return None if probe_machine().gpus else "there is no NVIDIA GPU"


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(scope="session")
def built_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture checkpoint, exported and built for ort-cpu by the commands. Read only."""
    return _made_by_commands(tmp_path_factory, "built", CHECKPOINT)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model that comes along, exported and built for ort-cpu. Read only."""
    return _made_by_commands(tmp_path_factory, "tiny", TINY, "--no-verify")


def _made_by_commands(
    factory: pytest.TempPathFactory, name: str, checkpoint: Path, *words: str
) -> Path:
    def make(folder: Path) -> None:
        bundle = str(folder / "bundle")
        _run("-m", "twotower.cli", "export", str(checkpoint), "-o", bundle, *words)
        _run("-m", "twotower.cli", "build", bundle, "--target", "ort-cpu")

    return made_once(factory, name, make) / "bundle"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it is released: built from the sdist, whose missing files are noticed here.

    TWOTOWER_DIST names a folder where `make wheel` has just built it.
    """
    if built := os.environ.get("TWOTOWER_DIST"):
        (path,) = (ROOT / built).glob("*.whl")
        return path
    folder = made_once(
        tmp_path_factory,
        "dist",
        lambda folder: _run("-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)),
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def tiny_statistics(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the trained model, made by the command a user types. Read only."""

    def make(folder: Path) -> None:
        prompts, suite = folder / "prompts.jsonl", "src/twotower/evaluate/data/suite.jsonl"
        lines = (ROOT / suite).read_text(encoding="utf-8").splitlines()[::13]
        texts = [json.dumps({"text": json.loads(line)["prompt"]}) + "\n" for line in lines]
        prompts.write_text("".join(texts), encoding="utf-8")
        words = [str(tiny_bundle), "--prompts", str(prompts), "-o", str(folder / "stats")]
        _run("-m", "twotower.cli", "calibrate", *words)

    return made_once(tmp_path_factory, "statistics", make) / "stats"


def _run(*arguments: str) -> None:
    done = run_python(*arguments)
    assert done.returncode == 0, f"python {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}"
