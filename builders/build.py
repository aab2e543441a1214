"""One build from start to publication: nothing half-written is seen under the target's name."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from twotower.builders.base import BuildConfig, BuildPlan, EngineBuilder, Report, silent
from twotower.builders.cache import EngineCache, open_cache
from twotower.bundle import (
    BUILD_FILE,
    Bundle,
    EngineRecord,
    engine_folder,
    read_engine_record,
    write_json,
)
from twotower.errors import BuildAbortedError, EngineMismatchError
from twotower.files import locked
from twotower.units import format_bytes

logger = logging.getLogger(__name__)


def build_engines(
    bundle: Bundle,
    target: str,
    builder: EngineBuilder,
    *,
    config: BuildConfig | None = None,
    report: Report | None = None,
) -> EngineRecord:
    """Builds the engines of one target into `engines/<target>`.

    A fitting engine that is already there is kept unless `config.force`. The new one is written
    beside it and takes its place by a rename, so that a killed build leaves the old engine usable.
    Of two builds of one target at a time the second waits for the first.

    Raises:
        BuildAbortedError: no space, or the process that built an engine died.
        BuildError: the library refuses the graph.
    """
    config, report = config or BuildConfig(), report or silent
    folder = engine_folder(bundle, target)
    if config.use_cache and config.cache is not None:
        EngineCache(config.cache, config.cache_bytes).prepare()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(
            folder.parent / f".{target}.lock",
            waiting=lambda: report(f"waiting for another build of {target}", 0, 0),
        ):
            _recover(folder)
            record = None if config.force else _there(bundle, target, builder.library())
            if record is not None:
                asked = builder.asked(bundle, config)
                if asked and record.report.get("asked") == asked:
                    return record
            plan = builder.plan(bundle, config)
            if record is None or not plan.keeps(record):
                record = _publish(bundle, folder, plan, report)
                _trim(bundle, config)
            return record
    except OSError as e:
        raise BuildAbortedError(
            f"the {target} engine of '{bundle.path}' could not be written",
            found=str(e),
            do="free disk space or check permissions, then build again",
        ) from e


def _there(bundle: Bundle, target: str, library: dict[str, str]) -> EngineRecord | None:
    """The record of sound engines that are there, whatever they were built for."""
    try:
        return read_engine_record(bundle, target, library=library)
    except EngineMismatchError as e:
        logger.debug("building %s: %s", target, e.found)
        return None


def _publish(
    bundle: Bundle,
    folder: Path,
    plan: BuildPlan,
    report: Report,
) -> EngineRecord:
    """Builds beside `folder` and renames it into its place; the old one goes last."""
    needed, free = plan.needed_bytes, shutil.disk_usage(bundle.path).free
    if needed > free:
        raise BuildAbortedError(
            f"not enough disk space under '{bundle.path}'",
            found=f"{format_bytes(needed)} needed, {format_bytes(free)} free",
            do="free space, or move the bundle to a larger disk",
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    try:
        record = plan.build(partial, report=report)
        write_json(partial / BUILD_FILE, record.to_json())
        os.chmod(partial, 0o755)  # mkdtemp is private; an engine is as readable as its bundle
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        if not folder.exists() and old.exists():  # interrupted between the two renames
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _recover(folder: Path) -> None:
    """Mends what a killed build left: nobody else writes here, because the lock is held."""
    for left in sorted(p for p in folder.parent.glob(f".{folder.name}.*") if p.is_dir()):
        if left.name.startswith(f".{folder.name}.old.") and not folder.exists():
            logger.warning("a build was killed between two renames; %s is the engine again", left)
            left.rename(folder)
        else:
            logger.info("removing %s, left by a killed build", left)
            shutil.rmtree(left, ignore_errors=True)


def _trim(bundle: Bundle, config: BuildConfig) -> None:
    """Keeps the cache within its bound; the engine is published, so that failing is a warning."""
    cache = open_cache(bundle, config)
    if cache is None:
        return
    try:
        cache.trim()
    except OSError as e:
        logger.warning("the engine cache '%s' could not be trimmed: %s", cache.folder, e)
