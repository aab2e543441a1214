"""What `twotower inspect` and `twotower build --dry-run` show of engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import copy_of, export_fixture
from tests.helpers.commands import Commands
from tests.helpers.rtx_program_text import Described, Launch, plan_of, program
from tests.helpers.trt.install import L4, install_fake, machine_with, see_gpu
from twotower.builders.trt.rtx_program.analysis import summarize_programs
from twotower.builders.trt.rtx_program.read import read_programs
from twotower.bundle import BUILD_FILE, GRAPH_FILES, Bundle, engine_folder
from twotower.cli import inspect
from twotower.cli.main import main


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With engines of the fake: several segments a tower."""
    folder = tmp_path_factory.mktemp("table")
    bundle = export_fixture("hybrid-a", folder / "bundle", "float16")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(folder, monkeypatch)
        assert main(["build", str(bundle.path), *OPTIONS.split()]) == 0
    return bundle


@pytest.fixture
def bundle(built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    pretend(tmp_path, monkeypatch)
    return Bundle.open(copy_of(built, tmp_path / "bundle"))


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT and a GPU are here."""
    install_fake(folder, monkeypatch)
    see_gpu(monkeypatch, L4)


OPTIONS = "--target trt --max-context 256 --segments 3"


def edit(bundle: Bundle, **changes: Any) -> None:
    file = engine_folder(bundle, "trt") / BUILD_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def shown(bundle: Bundle, cli: Commands) -> tuple[str, dict[str, Any]]:
    return cli("inspect", bundle.path).out, cli.json("inspect", bundle.path)


@pytest.mark.slow
def test_inspect_shows_what_was_built_and_json_has_all_of_it(bundle: Bundle, cli: Commands) -> None:
    record = json.loads((engine_folder(bundle, "trt") / BUILD_FILE).read_text())
    record["report"]["engines"]["context_head.engine"]["log"] = [
        {"severity": "WARNING", "message": "odd", "count": 1, "explained": None}
    ]
    edit(bundle, report=record["report"])
    text, facts = shown(bundle, cli)
    assert len(record["engines"]["denoiser"]) > 1
    words = ("trt: tensorrt 11.4.0.106", "SM 89", "float16", "prefill (B 1 to 8, L 1 to 256)")
    words += ("MATRIX_MULTIPLY", "1 unexplained", "weights read as inputs")
    assert [word for word in words if word not in text] == []
    rows = {line.split()[0]: line for line in text.splitlines() if ".engine " in line}
    for part in record["engines"]["denoiser"]:
        first, end = part["layers"]
        assert f" {first}-{end - 1} " in rows[part["file"]]
    told = facts["builds"]["trt"]
    assert told["state"] == facts["engines"]["trt"]
    assert {k: told[k] for k in told if k not in ("state", "copied_bytes", "launches")} == record


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"library": {"name": "tensorrt", "version": "11.3"}},
            "built with tensorrt 11.3, this environment has tensorrt 11.4.0.106",
        ),
        ({"graphs": {}}, "built from another graph"),
        (
            {"limits": {"capacity": 512, "max_batch": 8, "sms": [86]}},
            "built for SM 86, this GPU is SM 89",
        ),
        ({"schema": 1}, "another version of twotower"),
        ({}, "built, fits this machine"),
    ],
)
def test_inspect_says_whether_engines_fit_here(
    bundle: Bundle, cli: Commands, monkeypatch: pytest.MonkeyPatch, change: Any, says: str
) -> None:
    machine = machine_with(L4)
    object.__setattr__(machine, "libraries", {"tensorrt": "11.4.0.106"})
    monkeypatch.setattr(inspect, "probe_machine", lambda: machine)
    edit(bundle, **change)
    text, facts = shown(bundle, cli)
    assert says in facts["engines"]["trt"]
    assert says in text


def test_a_half_built_folder_is_no_target(bundle: Bundle, cli: Commands) -> None:
    shutil.copytree(engine_folder(bundle, "trt"), bundle.path / "engines" / ".rtx.old.1")
    _, facts = shown(bundle, cli)
    assert facts["engines"]["rtx"] == "not built"
    assert facts["builds"].keys() == {"trt"}


def test_a_dry_run_tells_what_is_cached(bundle: Bundle, cli: Commands) -> None:
    lines = []
    for more in ("", "--no-cache", "--force", "--max-batch 2"):
        out = cli("build", bundle.path, OPTIONS, "--dry-run", more).out
        lines.append([line for line in out.splitlines() if ".engine" in line])
    assert all("in the cache" in line for line in lines[0])
    assert not any("in the cache" in line for more in lines[1:] for line in more)
    assert all("of memory to build" in line for line in lines[1])


EXPANDED = program(
    tensors=[
        Described("tokens.1", ["rows.1", 64]),
        Described("q", [8, 64, 32], "int8", "p-consts"),
        Described("w", [8, 64, 32], "bf16", "scratch_1"),
        Described("y.1", ["rows.1", 32]),
    ],
    launches=[
        Launch("__myl_CastMulCast", ["q"], ["w"], ["layers.2.moe/DequantizeLinear"]),
        Launch("MatMul", ["tokens.1", "w"], ["y.1"], ["layers.2.moe/MatMul"], "fully_connected"),
    ],
)


def rows_of(text: str) -> list[list[str]]:
    """The table of programs, cell by cell."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if "capturable" in line)
    rows = [lines[head], *(line for line in lines[head:] if ".engine  " in line)]
    return [[cell.strip() for cell in row.split("  ") if cell] for row in rows]


def test_inspect_shows_what_the_engines_run(bundle: Bundle, cli: Commands) -> None:
    record = json.loads((engine_folder(bundle, "trt") / BUILD_FILE).read_text())
    for name, written in (
        ("denoiser.0.engine", EXPANDED),
        ("context_head.engine", program(capturable=0)),
    ):
        read = summarize_programs(read_programs(plan_of(written.text())))
        record["report"]["engines"][name]["inspector"] = read
    edit(bundle, report=record["report"])
    text, facts = shown(bundle, cli)
    head, *rows = rows_of(text)
    engines = [engine for parts in record["engines"].values() for engine in parts]
    names = {engine["file"]: engine["profiles"][0]["name"] for engine in engines}
    assert " ".join(head) == "engine profile kernels streams events scratch capturable expanded"
    same = ["2", "1", "1", "5 KiB"]
    ends = {
        "context_head.engine": ["no", "none"],
        "denoiser.0.engine": ["yes", "1 weights, 32 KiB a pass"],
    }
    want = {file: [names[file], *same, *end] for file, end in ends.items()}
    assert {row[0]: row[1:] for row in rows} == want
    assert "kernels moe 2" in text
    assert "expanded in memory layers.2.moe experts as bf16 (32 KiB)" in text
    told = facts["builds"]["trt"]["report"]["engines"]["denoiser.0.engine"]["inspector"]
    assert told["programs"][0]["kernels"] == 2


def test_inspect_of_an_engine_lists_what_was_fused(tmp_path: Path, cli: Commands) -> None:
    engine = tmp_path / "denoiser.engine"
    engine.write_bytes(plan_of(EXPANDED.text()))
    text, facts = cli("inspect", engine).out, cli.json("inspect", engine)
    assert "__myl_CastMulCast " in text
    assert "DequantizeLinear" in text
    assert [kernel["nodes"] for kernel in facts["kernels"][0]] == [
        ["layers.2.moe/DequantizeLinear"],
        ["layers.2.moe/MatMul"],
    ]
    assert facts["programs"][0]["expanded"][0]["nbytes"] == 32768


@pytest.mark.parametrize("contents", [b"", b"ptrt" + bytes(100), plan_of(program(layout=7).text())])
def test_an_engine_that_cannot_be_read_says_why(
    tmp_path: Path, cli: Commands, contents: bytes
) -> None:
    engine = tmp_path / "denoiser.engine"
    engine.write_bytes(contents)
    cli.refused("inspect", engine, what="Error")
    cli.refused("inspect", tmp_path / "none.engine", what="none.engine")


@pytest.mark.slow
@pytest.mark.parametrize("places", ["inputs", "inside"])
def test_weights_that_lie_twice_are_counted(bundle: Bundle, places: str, cli: Commands) -> None:
    cli("build", bundle.path, OPTIONS, f"--weights {places} --force")
    text, facts = shown(bundle, cli)
    weights = sum(ref.nbytes for graph in GRAPH_FILES for ref in bundle.weights(graph).values())
    assert facts["builds"]["trt"]["copied_bytes"] == (weights if places == "inside" else 0)
    assert ("weights that the bundle holds too" in text) == (places == "inside")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_widened_for_a_cpu_are_counted(tmp_path: Path, dtype: str, cli: Commands) -> None:
    bundle = export_fixture("hybrid-b", tmp_path / "bundle", dtype)
    cli("build", bundle.path, "--target ort-cpu")
    text, facts = shown(bundle, cli)
    widened = sum(file.stat().st_size for file in engine_folder(bundle, "ort-cpu").glob("*.data"))
    assert facts["builds"]["ort-cpu"]["copied_bytes"] == widened
    assert (widened > 0) == (dtype == "float16") == ("weights that the bundle holds too" in text)
