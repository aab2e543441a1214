"""What `builders` leave behind for `runtime`: one folder a target with its engines and a `build.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bundle.integrity import check_files
from twotower.bundle.manifest import Bundle
from twotower.bundle.steps import EngineFile, ExpertsStep, Step, step_from_json
from twotower.errors import EngineMismatchError
from twotower.files import FileRecord, Progress, inside

__all__ = [
    "BUILD_FILE",
    "EngineLimits",
    "EngineRecord",
    "built_targets",
    "engine_folder",
    "load_engine_record",
    "read_engine_record",
    "record_problems",
    "weight_bytes",
]

BUILD_FILE = "build.json"
SCHEMA = 3


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What was fixed when the engines were built.

    Attributes:
        capacity: T, positions of the key and value caches.
        max_batch: Most rows.
        sms: Compute capabilities the engines hold code for, e.g. 86; empty for a set the library
            chose.
    """

    capacity: int
    max_batch: int
    sms: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"capacity": self.capacity, "max_batch": self.max_batch, "sms": list(self.sms)}


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """A `build.json`.

    Attributes:
        target: For example `ort-cpu`.
        library: Name and version of the inference library the engines were built with.
        dtype: Element type the engines keep their buffers in.
        graphs: For each graph, SHA-256 of what it was built from, without its weights
            (`Bundle.program_identity`).
        weights: For each graph, the weight file relative to the bundle.
        holds: SHA-256 of the weights of every graph of which the engines hold some themselves;
            engines that hold none serve every checkpoint of the same shapes.
        files: Every file in the folder besides `build.json`.
        report: What the build observed: seconds, bytes, operators.
        limits: What the build fixed; None where shapes are free (ONNX Runtime).
        steps: For each graph what runs, in order: its engine, its segments, or programs with
            experts between them. Empty where every file is a graph.
    """

    target: str
    library: dict[str, str]
    dtype: str
    graphs: dict[str, str]
    weights: dict[str, str]
    files: dict[str, FileRecord]
    report: dict[str, Any] = field(default_factory=dict)
    limits: EngineLimits | None = None
    steps: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    holds: dict[str, str] = field(default_factory=dict)

    @property
    def engines(self) -> dict[str, tuple[EngineFile, ...]]:
        """For each graph its engines in the order they run."""
        return {
            name: tuple(s for s in steps if isinstance(s, EngineFile))
            for name, steps in self.steps.items()
        }

    @property
    def experts(self) -> dict[str, tuple[ExpertsStep, ...]]:
        """For each graph the experts that run between its engines, in order."""
        return {
            name: tuple(s for s in steps if isinstance(s, ExpertsStep))
            for name, steps in self.steps.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data that `read_engine_record` reads back."""
        return {
            "schema": SCHEMA,
            "target": self.target,
            "library": self.library,
            "dtype": self.dtype,
            "graphs": self.graphs,
            "weights": self.weights,
            "holds": self.holds,
            "files": {
                name: {"size": r.size, "sha256": r.sha256} for name, r in sorted(self.files.items())
            },
            "report": self.report,
            "limits": self.limits.to_json() if self.limits else None,
            "engines": {
                name: [step.to_json() for step in steps] for name, steps in self.steps.items()
            },
        }


def engine_folder(bundle: Bundle, target: str) -> Path:
    """Where the engines of a target lie."""
    return bundle.path / "engines" / target


def built_targets(path: Path) -> dict[str, tuple[int, ...]]:
    """Targets the bundle in a folder has engines for, with the compute capabilities they hold code for, none for any; nothing is checked.

    Half-built engines have hidden names and do not count.
    """
    out: dict[str, tuple[int, ...]] = {}
    for file in sorted((path / "engines").glob(f"*/{BUILD_FILE}")):
        if file.parent.name.startswith("."):
            continue
        try:
            limits = json.loads(file.read_text(encoding="utf-8"))["limits"]
            out[file.parent.name] = tuple(int(sm) for sm in limits["sms"]) if limits else ()
        except (OSError, ValueError, KeyError, TypeError):
            out[file.parent.name] = ()  # whoever opens it says what is wrong with it
    return out


def load_engine_record(bundle: Bundle, target: str) -> EngineRecord:
    """What `build.json` says; whether it is true and fits is not looked at.

    Raises:
        EngineMismatchError: not built, or not readable.
    """
    file = engine_folder(bundle, target) / BUILD_FILE
    if not file.is_file():
        found = f"built targets: {', '.join(built_targets(bundle.path)) or 'none'}"
        raise EngineMismatchError(
            f"bundle '{bundle.path}' has no engine for target {target}",
            found=found,
            do=_rebuild(bundle, target),
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise EngineMismatchError(
                f"the {target} engine of bundle '{bundle.path}' was built by another version of twotower",
                found=f"build.json has schema {data['schema']!r}, this version reads {SCHEMA}",
                do=f"{_rebuild(bundle, target)}; engines without weights take seconds",
            )
        return _parsed(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        found = f"{type(e).__name__}: {e}"
        raise EngineMismatchError(
            f"{file} is not readable", found=found, do=_rebuild(bundle, target)
        ) from e


def record_problems(
    record: EngineRecord,
    bundle: Bundle,
    target: str,
    *,
    library: Mapping[str, str] | None,
    sm: int | None = None,
) -> list[str]:
    """Why engines are not the ones asked for, from their record alone.

    Args:
        record: What `load_engine_record` read.
        bundle: The bundle they lie in.
        target: What they are wanted for.
        library: Name and version of the library that is about to run them; None if it is not known.
        sm: Compute capability of the GPU that is about to run them; None if there is none, or any
            will do.
    """
    problems = []
    if record.target != target:
        problems.append(f"built for target {record.target}, asked for {target}")
    problems += [
        f"{name}: built from another graph"
        for name in bundle.signatures
        if record.graphs.get(name) != bundle.program_identity(name)
    ]
    problems += [
        f"{name}: holds weights of another checkpoint"
        for name, data in record.holds.items()
        if data != bundle.data_identity(name)
    ]
    if library is not None and record.library != dict(library):
        problems.append(
            f"built with {_label(record.library)}, this environment has {_label(library)}"
        )
    sms = record.limits.sms if record.limits is not None else ()
    if sm is not None and sms and sm not in sms:
        problems.append(f"built for SM {', '.join(map(str, sms))}, this GPU is SM {sm}")
    return problems


def read_engine_record(
    bundle: Bundle,
    target: str,
    *,
    library: dict[str, str],
    sm: int | None = None,
    progress: Progress | None = None,
) -> EngineRecord:
    """Reads and checks the engines of one target.

    Args:
        bundle: An opened bundle.
        target: For example `ort-cpu`.
        library: Name and version of the library that is about to run them: engines are tied to it.
        sm: Compute capability of the GPU that is about to run them, if that is to be checked.
        progress: Called with (bytes hashed, bytes to hash).

    Raises:
        EngineMismatchError: not built, damaged, or built from other graphs, for another target or
            GPU, or with another library.
    """
    record = load_engine_record(bundle, target)
    problems = check_files(engine_folder(bundle, target), record.files, progress)
    problems += record_problems(record, bundle, target, library=library, sm=sm)
    if problems:
        raise EngineMismatchError(
            f"the {target} engine of bundle '{bundle.path}' does not fit",
            found="; ".join(problems),
            do=_rebuild(bundle, target),
        )
    return record


def weight_bytes(bundle: Bundle, record: EngineRecord, name: str) -> int:
    """Bytes of the file an engine's weights lie in, where they are not in the engine.

    Raises:
        EngineMismatchError: it is not in the bundle.
    """
    data = inside(bundle.path, record.weights[name])
    if data is None or not data.is_file():
        raise EngineMismatchError(
            f"the weights of the {name} engine are not where build.json says",
            found=f"{record.weights[name]!r}",
            do=f"run `twotower build {bundle.path} --target {record.target} --force`",
        )
    return data.stat().st_size


def _rebuild(bundle: Bundle, target: str) -> str:
    return f"run `twotower build {bundle.path} --target {target}`"


def _parsed(data: dict[str, Any]) -> EngineRecord:
    return EngineRecord(
        target=str(data["target"]),
        library=dict(data["library"]),
        dtype=str(data["dtype"]),
        graphs=dict(data["graphs"]),
        weights=dict(data["weights"]),
        files={
            str(k): FileRecord(int(v["size"]), str(v["sha256"])) for k, v in data["files"].items()
        },
        report=dict(data["report"]),
        limits=_limits(data["limits"]),
        steps={
            str(name): tuple(map(step_from_json, steps)) for name, steps in data["engines"].items()
        },
        holds=dict(data["holds"]),
    )


def _limits(data: dict[str, Any] | None) -> EngineLimits | None:
    if data is None:
        return None
    return EngineLimits(
        int(data["capacity"]), int(data["max_batch"]), tuple(int(sm) for sm in data["sms"])
    )


def _label(library: Mapping[str, str]) -> str:
    return f"{library.get('name')} {library.get('version')}"
