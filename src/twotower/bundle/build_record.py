"""What `builders` leave for `runtime`: a folder for each target, with engines and `build.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from twotower.bundle.integrity import check_files
from twotower.bundle.manifest import Bundle
from twotower.errors import EngineMismatchError
from twotower.files import FileRecord, Progress, inside
from twotower.records import at_path, decode, encode, stored
from twotower.spec import TensorSpec

BUILD_FILE = "build.json"
SCHEMA = 3


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes an engine is tuned for: for each dynamic axis letter the least, the best and the most.

    `name` is `prefill`, `block`, `decode`, `denoise` or `head`.
    """

    name: str
    axes: dict[str, tuple[int, int, int]]

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Whether every axis of this profile may take its size."""
        return all(least <= sizes[letter] <= most for letter, (least, _, most) in self.axes.items())


@dataclass(frozen=True, slots=True)
class EngineFile:
    """One engine: a graph, or some consecutive layers of it, a segment on the same stream.

    Attributes:
        file: Its name in the target's folder.
        layers: The first layer and the one after the last; of a program between experts those whose
            mixers it computes.
        inputs: Names of the graph; from the segment before `residual_in` and (denoiser)
            `conditioning`; after experts `experts_out`.
        outputs: Names of the graph; for the segment after `residual_out`, and from the first
            denoiser segment `conditioning` for all others; before experts `experts_in` and
            `shares`.
        profiles: In the order they were added to the engine.
        weights: Weights it reads as inputs, by their names in the bundle's weight table.
        constants: Names of the weights it holds inside.
        names: The engine's own names of inputs, outputs and weights, where they differ: equal
            programs of a tower are one file. All other attributes use the tower's names.
    """

    file: str
    layers: tuple[int, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    weights: tuple[TensorSpec, ...] = ()
    constants: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def own(self, name: str) -> str:
        """The engine's own name of an input, an output or a weight."""
        return self.names.get(name, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsStep:
    """The experts of one layer, computed by kernels.

    y = sum over experts of share * down(relu(up x)^2). Reads `experts_in` [B,L,D] and `shares`
    [experts,N] of the program before it and writes `experts_out` [B,L,D] for the one after it.

    Attributes:
        layer: Which.
        hidden: D.
        width: Of an expert.
        experts: Routed ones.
        top: How many of them a token has.
        shared_intermediate: Width of the shared expert that every token has; 0 for none.
        dtype: Of inputs, outputs and weights that are not quantized.
        formats: By quantized matrix (`up`, `down`, `shared_up`, `shared_down`) a name of `FORMATS`,
            and the weights of a row that share a scale, 0 for all.
        code: Folder of the compiled kernels, in the target's folder; layers of one shape share it.
        weights: By role (`up`, `up_scale`, `down`, ..., `shared_up`, ...) their names in the
            bundle's weight table.
    """

    layer: int
    hidden: int
    width: int
    experts: int
    top: int
    shared_intermediate: int
    dtype: str
    formats: Mapping[str, tuple[str, int]]
    code: str
    weights: Mapping[str, TensorSpec]

    def to_json(self) -> dict[str, Any]:
        """As an entry of `engines`, where it stands beside `EngineFile`."""
        return {"experts": encode(self)}

    @classmethod
    def from_json(cls, data: Any) -> ExpertsStep:
        """The inverse of `to_json`."""
        with at_path("experts"):
            return decode(
                cls,
                decode(dict[str, Any], data).get("experts"),
                strict=False,
            )


Step = EngineFile | ExpertsStep


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What was fixed when the engines were built.

    `capacity` is T, positions of the key and value caches; `sms` the compute capabilities with
    code, e.g. 86, empty for a set the library chose.
    """

    capacity: int
    max_batch: int
    sms: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """A `build.json`.

    Attributes:
        target: For example `ort-cpu`.
        library: Name and version of the inference library the engines were built with.
        dtype: Element type of the engines' buffers.
        graphs: SHA-256 of what each graph was built from, weights left out
            (`Bundle.program_identity`).
        weights: For each graph, the weight file relative to the bundle.
        holds: SHA-256 of the weights of every graph whose engines hold some; engines without any
            serve every checkpoint of the same shapes.
        files: Every file in the folder besides `build.json`.
        report: What the build observed: seconds, bytes, operators.
        limits: What the build fixed; None where shapes are free (ONNX Runtime).
        steps: What runs for each graph, in order: an engine, segments, or programs with experts
            between them. Empty where every file is a graph.
    """

    target: str
    library: dict[str, str]
    dtype: str
    graphs: dict[str, str]
    weights: dict[str, str]
    holds: dict[str, str] = field(default_factory=dict, metadata=stored(required=True))
    files: dict[str, FileRecord]
    report: dict[str, Any] = field(default_factory=dict, metadata=stored(required=True))
    limits: EngineLimits | None = field(default=None, metadata=stored(required=True))
    steps: dict[str, tuple[Step, ...]] = field(
        default_factory=dict, metadata=stored("engines", required=True)
    )

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
        """Plain data that `load_engine_record` reads back."""
        files = dict(sorted(self.files.items()))
        return {"schema": SCHEMA, **encode(replace(self, files=files))}


def engine_folder(bundle: Bundle, target: str) -> Path:
    """Where the engines of a target lie."""
    return bundle.path / "engines" / target


def built_targets(path: Path) -> dict[str, tuple[int, ...]]:
    """Targets a bundle's folder has engines for, with their compute capabilities; empty for any.

    Nothing is checked. Half-built engines have hidden names and do not count.
    """
    out: dict[str, tuple[int, ...]] = {}
    for file in sorted((path / "engines").glob(f"*/{BUILD_FILE}")):
        if file.parent.name.startswith("."):
            continue
        out[file.parent.name] = ()
        # An unreadable record counts as one for any GPU: whoever opens it says what is wrong.
        with suppress(OSError, ValueError, KeyError, TypeError):
            limits = json.loads(file.read_text(encoding="utf-8"))["limits"]
            out[file.parent.name] = tuple(limits["sms"])
    return out


def load_engine_record(bundle: Bundle, target: str) -> EngineRecord:
    """What `build.json` says, unchecked; EngineMismatchError if it is missing or unreadable."""
    file = engine_folder(bundle, target) / BUILD_FILE
    if not file.is_file():
        found = f"built targets: {', '.join(built_targets(bundle.path)) or 'none'}"
        raise EngineMismatchError(
            f"bundle '{bundle.path}' has no engine for target {target}",
            found=found,
            do=_rebuild(bundle, target),
        )
    try:
        data = decode(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
        if data.get("schema") != SCHEMA:
            raise EngineMismatchError(
                f"the {target} engine of bundle '{bundle.path}' was built by another version of "
                "twotower",
                found=f"build.json has schema {data.get('schema')!r}, this version reads {SCHEMA}",
                do=f"{_rebuild(bundle, target)}; engines without weights take seconds",
            )
        return decode(EngineRecord, data, strict=False)
    except (OSError, ValueError) as e:
        raise EngineMismatchError(
            f"{file} is not readable", found=str(e), do=_rebuild(bundle, target)
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

    `library` (name and version) and `sm` are what is about to run them; None skips that check.
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

    They are tied to `library`, name and version of what is about to run them; `sm` is the GPU's
    compute capability, if that is to be checked. `progress` is called with (bytes hashed, bytes to
    hash).

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
    """Bytes of the file an engine's outside weights lie in; EngineMismatchError if missing."""
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


def _label(library: Mapping[str, str]) -> str:
    return f"{library.get('name')} {library.get('version')}"
