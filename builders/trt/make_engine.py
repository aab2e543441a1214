"""Makes one engine, from the cache or in a child process.

A refused graph is kept, with the library's log and how to cut the graph down.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx

from twotower.builders.base import Report
from twotower.builders.cache import EngineCache
from twotower.builders.trt.engine_plan import EnginePlan
from twotower.bundle import Bundle, FileRecord, write_json
from twotower.errors import BuildAbortedError, BuildError

logger = logging.getLogger(__name__)

_README = """# A graph that could not be built

{what}

    {found}

- `graph.onnx`: the graph the library was given, with the shapes of all values. {weights}
- `job.json`: inputs, profiles and compute capabilities.
- `log.json`: what the library said, in order.

In this folder:

    {check}

builds it again and says why not. To see its nodes, and to cut it down to the ones that are refused:

    {inspect}
    {reduce}

`debug reduce` itself reads no weights; it needs the package onnx-graphsurgeon.
If the graph is that of a whole tower, build with
--segments first: each segment is a graph of its own then, and the one that fails is far smaller.
"""

_WEIGHTS_ARE_INPUTS = "Its weights are inputs."
_WEIGHTS_BESIDE = (
    "Weights that are not inputs are in `{data}`, a link\n"
    "  to the bundle's own file: `cp -rL` copies both. "
    "(A second hard name would keep `onnx.load` from reading the bundle's weights.)"
)


class RefusedError(BuildError):
    """The library makes no engine of this graph; `log` has its lines or its stderr."""

    log: tuple[Any, ...] = ()


class CrashedError(RefusedError, BuildAbortedError):
    """The library crashed over a graph: it is kept like a refused one, but may yet build."""


class EngineMaker:
    """Makes engines in a folder, one after another.

    Each is put into the cache at once, so that an interrupted build goes on from there; `force`
    takes none from the cache.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        cache: EngineCache | None,
        *,
        force: bool,
        report: Report,
    ) -> None:
        self._failed = bundle.path / "engines" / ".failed"
        self._folder, self._cache, self._force, self._report = folder, cache, force, report

    def make(self, plan: EnginePlan) -> tuple[FileRecord, dict[str, Any]]:
        """The engine's size and SHA-256, and what its build observed."""
        output = self._folder / plan.engine.file
        if self._cache is not None and not self._force:
            found = self._cache.take(plan.key, output, report=self._report)
            if found is not None:
                return found.record, {**found.facts, "key": plan.key, "cached": True}
        facts = self._built(plan, output)
        if self._cache is not None:
            record = self._cache.put(
                plan.key,
                output,
                facts,
                report=self._report,
            )
        else:
            record = FileRecord.of(output)
        return record, {**facts, "key": plan.key, "cached": False}

    def _built(self, plan: EnginePlan, output: Path) -> dict[str, Any]:
        """Builds in a child process. An earlier failure of the same engine is forgotten then."""
        started = time.perf_counter()
        name = f"{plan.job['target']}-{plan.engine.file.removesuffix('.engine')}"
        failed = self._failed / name
        scratch = self._folder / "scratch"
        scratch.mkdir()
        (scratch / "graph.onnx").write_bytes(plan.model)
        places = {
            "graph": str(scratch / "graph.onnx"),
            "beside": str(plan.beside),
            "output": str(output),
        }

        def tell(phase: str, step: int, steps: int) -> None:
            self._report(f"{output.name}: {phase}", step, steps)

        try:
            facts = run_job({**plan.job, **places}, scratch, tick=tell)
        except RefusedError as e:
            raise _keep_failed(failed, plan, e) from e
        finally:
            shutil.rmtree(scratch)
        if failed.is_dir():
            shutil.rmtree(failed, ignore_errors=True)
            logger.info("removed %s: the engine builds now", failed)
        return {**facts, "seconds": round(time.perf_counter() - started, 2)}


def _keep_failed(folder: Path, plan: EnginePlan, error: RefusedError) -> BuildError:
    """Keeps a failed graph; the error, of the same class, with folder and next commands."""
    kind = BuildAbortedError if isinstance(error, BuildAbortedError) else BuildError
    found = f"{plan.engine.file}: {error.found}"
    data = plan.beside.with_name(f"{plan.beside.name}.data")
    script = "python -m twotower.builders.try_graph"
    options = f"--target {plan.job['target']} --job job.json"
    check = f"{script} graph.onnx {options}"
    inspect = "polygraphy inspect model graph.onnx --show layers --ignore-external-data"
    reduce = (
        "polygraphy debug reduce graph.onnx -o reduced.onnx --ignore-external-data "
        # where polygraphy puts what it wants checked
        f"--no-shape-inference --fail-code 1 --check {script} polygraphy_debug.onnx {options}"
    )
    readme = _README.format(
        check=check,
        inspect=inspect,
        reduce=reduce,
        what=error.what,
        found=error.found,
        weights=(_WEIGHTS_BESIDE if plan.places.inside else _WEIGHTS_ARE_INPUTS).format(
            data=data.name
        ),
    )
    # A part that is cut out of the graph knows its inputs by the shapes that are written down here.
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(plan.model), data_prop=True)
    job = {key: value for key, value in plan.job.items() if key != "timing_cache"}
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "graph.onnx").write_bytes(graph.SerializeToString())
        if plan.places.inside:
            (folder / data.name).symlink_to(os.path.relpath(data.resolve(), folder.resolve()))
        write_json(folder / "job.json", job)
        (folder / "log.json").write_text(json.dumps(error.log, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(readme, encoding="utf-8")
    except OSError as e:
        do = f"{error.do}; the graph could not be kept: {e}"
        return kind(error.what, found=found, do=do)
    do = f"`cd {folder}`, then `{inspect}` shows the graph and `{reduce}` cuts it down (README.md)"
    return kind(error.what, found=found, do=do)


def run_job(job: dict[str, Any], scratch: Path, *, tick: Report) -> dict[str, Any]:
    """Builds one engine in a child process, which dies with this call.

    Raises:
        RefusedError: the library refused the graph, or crashed over it (`CrashedError`).
        BuildAbortedError: there was no memory or no space for it.
    """
    job = {**job, "parent": os.getpid()}
    file = scratch / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    # The package is found where this very file was found, whatever the child's working directory.
    package = Path(str(sys.modules["twotower"].__file__)).parent
    paths = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "twotower.builders.trt.child", str(file)]
    environment = {**os.environ, "PYTHONPATH": paths}
    with (scratch / "stderr.txt").open("w+b") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            result = _followed(child, tick)
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if "error" in result and not result["refused"]:
        raise BuildAbortedError(**result["error"])
    if "error" in result:
        refused = RefusedError(**result["error"])
        refused.log = tuple(result["log"])
        raise refused
    if "done" not in result:
        raise _died(child.returncode, said)
    died = {"why_not": "; ".join(["the process died while it looked", *said[-1:]])}
    return {**result["done"], "inspector": result.get("inspected", died)}


def _followed(child: subprocess.Popen[str], tick: Report) -> dict[str, Any]:
    """What the child said in the end, all its lines as one; empty if it died before that."""
    assert child.stdout is not None
    result: dict[str, Any] = {}
    for text in child.stdout:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            continue  # something a library printed
        if "phase" in line:
            tick(line["phase"], line["step"], line["steps"])
        else:
            result |= line
    child.wait()
    return result


def _died(code: int, said: list[str]) -> BuildError:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    what, found = "the process that built the engine died", "; ".join([name, *said[-2:]])
    if code == -signal.SIGKILL:
        do = "free memory; a lower --max-build-memory cuts towers whose engines hold weights"
        return BuildAbortedError(what, found=f"{found}: most likely for want of memory", do=do)
    if code >= 0:  # not the library: an exception of ours
        return BuildAbortedError(
            what, found=found, do="this is a defect of twotower: report it with what --debug shows"
        )
    crashed = CrashedError(
        what, found=found, do="build again; if it fails again, try another dtype"
    )
    crashed.log = tuple(said)
    return crashed
