"""What `builders` leave behind for `runtime`: one folder a target with its engines and a `build.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bundle.integrity import FileRecord, Progress, check_files
from twotower.bundle.manifest import Bundle
from twotower.errors import EngineMismatchError

__all__ = ["BUILD_FILE", "EngineRecord", "engine_folder", "read_engine_record"]

BUILD_FILE = "build.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """A `build.json`.

    Attributes:
        target: For example `ort-cpu`.
        library: Name and version of the inference library the engines were built with.
        dtype: Element type the engines keep their buffers in.
        graphs: For each graph, the identity of what it was built from (`Bundle.graph_identity`).
        weights: For each graph, the weight file relative to the bundle.
        files: Every file in the folder besides `build.json`.
        report: What the build observed: seconds, bytes, operators.
    """

    target: str
    library: dict[str, str]
    dtype: str
    graphs: dict[str, str]
    weights: dict[str, str]
    files: dict[str, FileRecord]
    report: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `read_engine_record` reads back."""
        return {
            "schema": SCHEMA,
            "target": self.target,
            "library": self.library,
            "dtype": self.dtype,
            "graphs": self.graphs,
            "weights": self.weights,
            "files": {name: {"size": r.size, "sha256": r.sha256} for name, r in sorted(self.files.items())},
            "report": self.report,
        }


def engine_folder(bundle: Bundle, target: str) -> Path:
    """Where the engines of a target lie."""
    return bundle.path / "engines" / target


def read_engine_record(bundle: Bundle, target: str, *, library: dict[str, str], progress: Progress | None = None) -> EngineRecord:
    """Reads and checks the engines of one target.

    Args:
        bundle: An opened bundle.
        target: For example `ort-cpu`.
        library: Name and version of the library that is about to run them: engines are tied to it.
        progress: Called with (bytes hashed, bytes to hash).

    Raises:
        EngineMismatchError: not built, damaged, or built from other graphs, for another target or with another library.
    """
    folder = engine_folder(bundle, target)
    rebuild = f"run `twotower build {bundle.path} --target {target}`"
    built = sorted(p.parent.name for p in folder.parent.glob(f"*/{BUILD_FILE}"))
    if not (folder / BUILD_FILE).is_file():
        raise EngineMismatchError(
            f"bundle '{bundle.path}' has no engine for target {target}", found=f"built targets: {', '.join(built) or 'none'}", do=rebuild
        )
    try:
        record = _parsed(json.loads((folder / BUILD_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise EngineMismatchError(f"{folder / BUILD_FILE} is not readable", found=f"{type(e).__name__}: {e}", do=rebuild) from e
    problems = check_files(folder, record.files, progress)
    if record.target != target:
        problems.append(f"built for target {record.target}, asked for {target}")
    problems += [
        f"{name}: built from another graph" for name in bundle.signatures if record.graphs.get(name) != bundle.graph_identity(name)
    ]
    if record.library != library:
        problems.append(f"built with {_label(record.library)}, this environment has {_label(library)}")
    if problems:
        raise EngineMismatchError(f"the {target} engine of bundle '{bundle.path}' does not fit", found="; ".join(problems), do=rebuild)
    return record


def _parsed(data: dict[str, Any]) -> EngineRecord:
    if data["schema"] != SCHEMA:
        raise ValueError(f"schema {data['schema']!r}, this version reads {SCHEMA}")
    return EngineRecord(
        target=str(data["target"]),
        library=dict(data["library"]),
        dtype=str(data["dtype"]),
        graphs=dict(data["graphs"]),
        weights=dict(data["weights"]),
        files={str(k): FileRecord(int(v["size"]), str(v["sha256"])) for k, v in data["files"].items()},
        report=dict(data["report"]),
    )


def _label(library: dict[str, str]) -> str:
    return f"{library.get('name')} {library.get('version')}"
