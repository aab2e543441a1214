"""One engine, out of the cache or out of a child process; a graph the library refuses is kept for whoever looks into it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from twotower.builders.base import Report
from twotower.builders.cache_store import EngineCache
from twotower.builders.engine_plan import EnginePlan
from twotower.builders.failed import forget_failed, keep_failed
from twotower.builders.job import RefusedError, run_job
from twotower.bundle import Bundle, FileRecord, hash_file

__all__ = ["EngineMaker"]


class EngineMaker:
    """Makes engines in a folder, one after another. Each is kept in the cache at once, so that an interrupted build goes on from there.

    Args:
        bundle: Where the graphs and weights are.
        folder: Gets the engines.
        cache: Engines that were built before; None for none.
        force: Take none from the cache.
        report: Called with the progress.
    """

    def __init__(self, bundle: Bundle, folder: Path, cache: EngineCache | None, *, force: bool, report: Report) -> None:
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
            found = self._cache.take(plan.key, output, tick=lambda done, total: self._report(f"{file}: from the cache", done, total))
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
        places = {"graph": str(scratch / "graph.onnx"), "beside": str(plan.beside), "output": str(output)}
        try:
            facts = run_job(
                {**plan.job, **places}, scratch, tick=lambda phase, step, steps: self._report(f"{output.name}: {phase}", step, steps)
            )
        except RefusedError as e:
            raise keep_failed(self._bundle, plan, e) from e
        finally:
            shutil.rmtree(scratch)
        return {**facts, "seconds": round(time.perf_counter() - started, 2)}
