"""One engine, out of the cache or out of a child process; a graph the library refuses is kept, with what it said and how to cut it down."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import onnx

from twotower.builders.base import Report
from twotower.builders.cache import EngineCache
from twotower.builders.trt.engine_plan import EnginePlan
from twotower.builders.trt.job import RefusedError, run_job
from twotower.bundle import Bundle, FileRecord, hash_file, write_json
from twotower.errors import BuildAbortedError, BuildError

__all__ = ["FAILED_FOLDER", "EngineMaker", "failed_folder", "forget_failed", "keep_failed"]


class EngineMaker:
    """Makes engines in a folder, one after another. Each is kept in the cache at once, so that an interrupted build goes on from there.

    Args:
        bundle: Where the graphs and weights are.
        folder: Gets the engines.
        cache: Engines that were built before; None for none.
        force: Take none from the cache.
        report: Called with the progress.
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
        self._bundle = bundle
        self._folder = folder
        self._cache = cache
        self._force = force
        self._report = report

    def make(self, plan: EnginePlan) -> tuple[FileRecord, dict[str, Any]]:
        """The engine's size and SHA-256, and what its build observed.

        Raises:
            BuildError: it cannot be built.
        """
        file = plan.engine.file
        output = self._folder / file
        if self._cache is not None and not self._force:
            found = self._cache.take(
                plan.key,
                output,
                tick=lambda done, total: self._report(f"{file}: from the cache", done, total),
            )
            if found is not None:
                return found.record, {**found.facts, "key": plan.key, "cached": True}
        facts = self._built(plan, output)
        forget_failed(self._bundle, plan)

        def tick(done: int, total: int) -> None:
            self._report(f"{file}: checksum", done, total)

        if self._cache is not None:
            record = self._cache.put(plan.key, output, facts, tick=tick)
        else:
            record = FileRecord(output.stat().st_size, hash_file(output))
        return record, {**facts, "key": plan.key, "cached": False}

    def _built(self, plan: EnginePlan, output: Path) -> dict[str, Any]:
        """Builds in a child process."""
        started = time.perf_counter()
        scratch = self._folder / "scratch"
        scratch.mkdir()
        (scratch / "graph.onnx").write_bytes(plan.model)
        places = {
            "graph": str(scratch / "graph.onnx"),
            "beside": str(plan.beside),
            "output": str(output),
        }
        try:
            facts = run_job(
                {**plan.job, **places},
                scratch,
                tick=lambda phase, step, steps: self._report(
                    f"{output.name}: {phase}", step, steps
                ),
            )
        except RefusedError as e:
            raise keep_failed(self._bundle, plan, e) from e
        finally:
            shutil.rmtree(scratch)
        return {**facts, "seconds": round(time.perf_counter() - started, 2)}


logger = logging.getLogger(__name__)

FAILED_FOLDER = ".failed"

_README = """# A graph that could not be built

{what}

    {found}

- `graph.onnx`: the graph the library was given, with the shapes of all values written down. {weights}
- `job.json`: inputs, profiles and compute capabilities.
- `log.json`: what the library said, in order.

In this folder:

    {check}

builds it again and says why not. To see its nodes, and to cut it down to the ones that are refused:

    {inspect}
    {reduce}

`debug reduce` itself reads no weights; it needs the package onnx-graphsurgeon. If the graph is that of a whole tower, build with
--segments first: each segment is a graph of its own then, and the one that fails is far smaller.
"""

_WEIGHTS_ARE_INPUTS = "Its weights are inputs."
_WEIGHTS_BESIDE = (
    "Weights that are not inputs are in `{data}`, a link\n  to the bundle's own file: `cp -rL` copies both. "
    "(A second hard name would keep `onnx.load` from reading the bundle's weights.)"
)


def keep_failed(bundle: Bundle, plan: EnginePlan, error: RefusedError) -> BuildError:
    """Keeps the graph of a failed build.

    Returns:
        The error with the folder and the next commands, a `BuildAbortedError` still if it was one.
    """
    kind = BuildAbortedError if isinstance(error, BuildAbortedError) else BuildError
    folder = failed_folder(bundle, plan)
    data = plan.beside.with_name(f"{plan.beside.name}.data")
    check = f"python -m twotower.builders.try_graph graph.onnx --target {plan.job['target']} --job job.json"
    inspect = "polygraphy inspect model graph.onnx --show layers --ignore-external-data"
    # where polygraphy puts what it wants checked
    on_part = check.replace("graph.onnx", "polygraphy_debug.onnx")
    reduce = (
        "polygraphy debug reduce graph.onnx -o reduced.onnx --ignore-external-data "
        f"--no-shape-inference --fail-code 1 --check {on_part}"
    )
    weights = _WEIGHTS_BESIDE.format(data=data.name) if plan.places.inside else _WEIGHTS_ARE_INPUTS
    words = {
        "check": check,
        "inspect": inspect,
        "reduce": reduce,
        "what": error.what,
        "found": error.found,
        "weights": weights,
    }
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "graph.onnx").write_bytes(_with_shapes(plan.model))
        if plan.places.inside:
            (folder / data.name).symlink_to(os.path.relpath(data.resolve(), folder.resolve()))
        write_json(
            folder / "job.json",
            {key: value for key, value in plan.job.items() if key != "timing_cache"},
        )
        (folder / "log.json").write_text(json.dumps(error.log, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_README.format(**words), encoding="utf-8")
    except OSError as e:
        return kind(
            error.what,
            found=f"{plan.engine.file}: {error.found}",
            do=f"{error.do}; the graph could not be kept: {e}",
        )
    do = f"`cd {folder}`, then `{inspect}` shows the graph and `{reduce}` cuts it down (README.md there)"
    return kind(error.what, found=f"{plan.engine.file}: {error.found}", do=do)


def forget_failed(bundle: Bundle, plan: EnginePlan) -> None:
    """Removes what an earlier failure of the same engine left: it builds now."""
    folder = failed_folder(bundle, plan)
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        logger.info("removed %s: the engine builds now", folder)


def failed_folder(bundle: Bundle, plan: EnginePlan) -> Path:
    """Where the graph of a failed build is kept."""
    return (
        bundle.path
        / "engines"
        / FAILED_FOLDER
        / f"{plan.job['target']}-{plan.engine.file.removesuffix('.engine')}"
    )


def _with_shapes(serialized: bytes) -> bytes:
    """The graph with the type and shape of every value written down: a part that is cut out of it then knows its inputs."""
    return bytes(
        onnx.shape_inference.infer_shapes(
            onnx.load_from_string(serialized), data_prop=True
        ).SerializeToString()
    )
