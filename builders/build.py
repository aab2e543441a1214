"""One build from start to publication: nothing half-written is ever seen under the target's name."""

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

__all__ = ["build_engines"]

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
            if record is not None and _says(record, builder.asked(bundle, config)):
                return record
            plan = builder.plan(bundle, config)
            if record is None or not plan.keeps(record):
                record = _built(bundle, folder, plan, report=report)
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


def _says(record: EngineRecord, asked: str) -> bool:
    """Whether a record says of itself that it is what is asked for."""
    return bool(asked) and record.report.get("asked") == asked


def _built(bundle: Bundle, folder: Path, plan: BuildPlan, *, report: Report) -> EngineRecord:
    _require_space(bundle, plan.needed_bytes)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        record = plan.build(partial, report=report)
        write_json(partial / BUILD_FILE, record.to_json())
        os.chmod(partial, 0o755)  # mkdtemp is private; an engine is as readable as its bundle
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _replace(partial: Path, folder: Path) -> None:
    """Puts `partial` in the place of `folder`; the old one goes last."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    try:
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        if not folder.exists() and old.exists():  # interrupted between the two
            old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Mends what a build that was killed outright left: nobody else writes here, because the lock is held."""
    for left in sorted(p for p in folder.parent.glob(f".{folder.name}.*") if p.is_dir()):
        if left.name.startswith(f".{folder.name}.old.") and not folder.exists():
            logger.warning("a build was killed between two renames; %s is the engine again", left)
            left.rename(folder)
        else:
            logger.info("removing %s, left by a killed build", left)
            shutil.rmtree(left, ignore_errors=True)


def _trim(bundle: Bundle, config: BuildConfig) -> None:
    """Keeps the cache within its bound. The engine is published by now: what goes wrong here is a warning."""
    cache = open_cache(bundle, config)
    try:
        if cache is not None:
            cache.trim()
    except OSError as e:
        logger.warning(
            "the engine cache '%s' could not be trimmed: %s", cache.folder if cache else "", e
        )


def _require_space(bundle: Bundle, needed: int) -> None:
    free = shutil.disk_usage(bundle.path).free
    if needed > free:
        raise BuildAbortedError(
            f"not enough disk space under '{bundle.path}'",
            found=f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            do="free space, or move the bundle to a larger disk",
        )
