"""Slices of the published model at real widths, through export and build: what each engine took, as rows of plain data."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.bundle import Bundle
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.export.synthetic import SyntheticOptions, published_slice, write_checkpoint
from twotower.planning import PlanOptions, plan_bundle

SMS = (89, 120)
MAX_CONTEXT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Some layers of the published model.

    Attributes:
        name: Its layers.
        changes: Fields of the config that are other than published.
        bounds: Values of --max-build-memory to build with, None for none.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    bounds: tuple[int | None, ...] = (None,)


# Every slice has an attention layer (47 MB): without one nothing reads the lengths of the texts, and an unread input is refused.
SLICES = (
    Slice(name="*"),
    Slice(name="M*"),
    Slice(name="E*"),
    Slice(name="ME*", bounds=(None, 10_000_000_000)),
)


def measure(piece: Slice, scratch: Path, *, say: Callable[[str], None], options: SyntheticOptions | None = None) -> list[dict[str, Any]]:
    """Builds a slice within each of its bounds; the folder is empty before and after.

    Returns:
        A row for each engine.
    """
    rows: list[dict[str, Any]] = []
    config = {**published_slice(piece.name), **piece.changes}
    try:
        say(f"{piece.name}: writing a synthetic checkpoint")
        checkpoint = Checkpoint.open(write_checkpoint(scratch / "checkpoint", config, options))
        say(f"{piece.name}: exporting")
        bundle = export_bundle(checkpoint, scratch / "bundle", ExportConfig(dtype="bfloat16"))
        shutil.rmtree(scratch / "checkpoint")
        for bound in piece.bounds:
            say(f"{piece.name}: building" + (f" with at most {bound / 1e9:g} GB" if bound else ""))
            rows += _built(piece, bundle, bound)
    finally:
        shutil.rmtree(scratch / "checkpoint", ignore_errors=True)
        shutil.rmtree(scratch / "bundle", ignore_errors=True)
    return rows


def _built(piece: Slice, bundle: Bundle, bound: int | None) -> Iterator[dict[str, Any]]:
    config = BuildConfig(sms=SMS, max_context=MAX_CONTEXT, max_build_memory=bound, use_cache=False, force=True)
    with _watched_children() as seen:
        record = build_engines(bundle, "rtx", builder_for("rtx"), config=config)
    options = PlanOptions(target="rtx", dtype="bfloat16", max_context=MAX_CONTEXT, max_build_memory=bound)
    planned = {engine.name: engine for engine in plan_bundle(bundle.config, options).engines}
    if len(seen) != len(planned) or set(planned) != set(record.report["engines"]):
        raise SystemExit(f"{len(planned)} engines were planned, {len(record.report['engines'])} built, {len(seen)} processes seen")
    for (name, facts), (anonymous, mapped) in zip(record.report["engines"].items(), seen.values(), strict=True):
        plan = planned[name]
        yield {
            "slice": piece.name,
            "sms": list(record.limits.sms if record.limits else ()),
            "bound": bound,
            "engine": name,
            "weights": plan.weight_bytes,
            "planned": {"peak": plan.build_peak_bytes, "seconds": plan.build_seconds, "size": plan.engine_bytes},
            "peak": facts["peak_memory"],
            "anonymous": anonymous,
            "mapped": mapped,
            "parse_seconds": facts["parse_seconds"],
            "seconds": facts["seconds"],
            "size": record.files[name].size,
            "layers": facts["layers"],
            "unexplained": [line["message"] for line in facts["log"] if not line["explained"]],
            "library": record.library["version"],
        }


@contextmanager
def _watched_children() -> Iterator[dict[int, tuple[int, int]]]:
    """Samples the memory of this process's children: for each, in the order they came, its most anonymous and most mapped bytes."""
    seen: dict[int, tuple[int, int]] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for pid in _children():
                status = _status(pid)
                if status is not None:
                    seen[pid] = tuple(max(a, b) for a, b in zip(seen.get(pid, (0, 0)), status, strict=True))  # type: ignore[assignment]

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _children() -> list[int]:
    files = Path("/proc/self/task").glob("*/children")
    return [int(word) for file in files for word in file.read_text(encoding="ascii").split()]


def _status(pid: int) -> tuple[int, int] | None:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(("RssAnon", "RssFile"))}
    return (values["RssAnon"], values["RssFile"]) if len(values) == 2 else None


def wait_for_memory(needed: int, *, say: Callable[[str], None], seconds: float = 600) -> None:
    """Waits until the machine has so much memory available, for other programs may be at work."""
    began = time.monotonic()
    while _available() < needed and time.monotonic() - began < seconds:
        say(f"waiting for {needed / 1e9:.0f} GB of memory")
        time.sleep(5)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
