"""One build from start to publication: nothing half-written is ever seen under the target's name."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from twotower.builders.base import BuildConfig, EngineBuilder, Report
from twotower.bundle import BUILD_FILE, Bundle, EngineRecord, engine_folder, read_engine_record, write_json
from twotower.errors import BuildError, EngineMismatchError

__all__ = ["build_engines"]

logger = logging.getLogger(__name__)


def build_engines(
    bundle: Bundle, target: str, builder: EngineBuilder, *, config: BuildConfig | None = None, report: Report | None = None
) -> EngineRecord:
    """Builds the engines of one target into `engines/<target>`.

    A fitting engine that is already there is kept unless `config.force`. The new one is written beside it and takes its place by a
    rename, so that a killed build leaves the old engine usable.

    Raises:
        BuildError: no space, or the library refuses the graph.
    """
    folder = engine_folder(bundle, target)
    if not (config or BuildConfig()).force:
        try:
            return read_engine_record(bundle, target, library=builder.library())
        except EngineMismatchError as e:
            logger.debug("building %s: %s", target, e.found)
    _require_space(bundle, builder.needed_bytes(bundle))
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target}.", dir=folder.parent))
    try:
        record = builder.build(bundle, partial, report or _silent)
        write_json(partial / BUILD_FILE, record.to_json())
        os.chmod(partial, 0o755)  # mkdtemp is private; an engine is as readable as its bundle
        _replace(partial, folder)
    except OSError as e:
        raise BuildError(
            f"the {target} engine of '{bundle.path}' could not be written",
            found=str(e),
            do="free disk space or check permissions, then build again",
        ) from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _replace(partial: Path, folder: Path) -> None:
    """Puts `partial` in the place of `folder`; the old one goes last."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _require_space(bundle: Bundle, needed: int) -> None:
    free = shutil.disk_usage(bundle.path).free
    if needed > free:
        raise BuildError(
            f"not enough disk space under '{bundle.path}'",
            found=f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            do="free space, or move the bundle to a larger disk",
        )


def _silent(what: str, done: int, total: int) -> None:
    return
