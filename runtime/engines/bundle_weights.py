"""A bundle's weights for engines that read them as inputs: do they fit, and what goes where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    EngineFile,
    EngineRecord,
    FileRecord,
    Progress,
    Step,
    remember_files,
    unverified_files,
)
from twotower.errors import EngineMismatchError
from twotower.runtime.weights.load_requests import LoadRequest
from twotower.runtime.weights.store import WeightStore
from twotower.spec import TensorSpec
from twotower.weights.refs import WeightRef

__all__ = ["check_weights", "load_weights", "reads_of", "requests_of"]


def check_weights(
    record: EngineRecord, tables: Mapping[str, Mapping[str, WeightRef]], bundle: Bundle
) -> None:
    """Refuses engines that were built for other weights than the bundle holds.

    Args:
        record: What the engines read as inputs, and what they hold.
        tables: The bundle's weights, by graph and name.
        bundle: For the message.

    Raises:
        EngineMismatchError: a weight is missing, of another shape or type, or neither an input nor
            inside.
        BundleError: the bundle holds no weights.
    """
    bundle.require_weights("running engines")
    problems: list[str] = []
    for name, parts in record.engines.items():
        table, inside = tables[name], {n for part in parts for n in part.constants}
        experts = [w for step in record.experts[name] for w in step.weights.values()]
        for spec in (*(w for part in parts for w in part.weights), *experts):
            has = table.get(spec.name)
            if has is None:
                problems.append(f"{spec.name} is not in the bundle")
            elif (has.dtype, has.shape) != (spec.dtype, spec.axes):
                wants = f"{spec.dtype} {list(spec.axes)}"
                problems.append(f"{spec.name} is {has.dtype} {list(has.shape)}, expected {wants}")
            inside.add(spec.name)
        problems += [f"{n} is neither an input nor inside" for n in table if n not in inside]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise EngineMismatchError(
            f"the {record.target} engines do not fit the weights of bundle '{bundle.path}'",
            found="; ".join(problems[:5]) + more,
            do=f"`twotower build {bundle.path} --target {record.target} --force`",
        )


def requests_of(
    bundle: Bundle, record: EngineRecord, placed: Mapping[str, Sequence[int]]
) -> list[LoadRequest]:
    """What every device needs: the weights of the engines that are placed on it, and of the experts that follow them."""
    out = []
    for name, steps in record.steps.items():
        table, file = bundle.weights(name), bundle.files[GRAPH_FILES[name] + DATA_SUFFIX]
        for device, reads in zip(placed[name], reads_of(steps), strict=True):
            out.append(
                LoadRequest(
                    bundle.data_file(name), file, {w.name: table[w.name] for w in reads}, device
                )
            )
    return out


def reads_of(steps: Sequence[Step]) -> list[list[TensorSpec]]:
    """The weights that every engine of a graph and the experts after it read."""
    out: list[list[TensorSpec]] = []
    for step in steps:
        if isinstance(step, EngineFile):
            out.append(list(step.weights))
        else:
            out[-1] += step.weights.values()
    return out


def load_weights(
    store: WeightStore,
    bundle: Bundle,
    requests: Sequence[LoadRequest],
    *,
    progress: Progress | None = None,
) -> None:
    """Brings weights to the devices; a file that was not hashed before is hashed on the way.

    A file of which no engine reads anything is neither read nor taken for sound.

    Raises:
        BundleError: a file is not what the bundle says.
        EngineMismatchError: a device has not so much memory.
    """
    read = {request.file for request in requests if request.weights}
    files: dict[str, FileRecord] = {
        name: file for name, file in bundle.files.items() if bundle.path / name in read
    }
    new = unverified_files(bundle.path, files)
    hashed = {bundle.path / name for name in new}
    for whether in (True, False):
        some = [request for request in requests if (request.file in hashed) == whether]
        store.load(some, hashed=whether, progress=progress)
    remember_files(bundle.path, new)
