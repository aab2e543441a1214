"""What a builder is asked for and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle, EngineRecord
from twotower.errors import ConfigError

Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all); the numbers are bytes or steps."""

DEFAULT_MAX_BATCH = 8
DEFAULT_MAX_CONTEXT = 4096
DEFAULT_CACHE_BYTES = 20 * 10**9

INPUTS, INSIDE = "inputs", "inside"
PLACES = (INPUTS, INSIDE)
"""Where weights go: to the engine's inputs, but for those that must be constants; or inside."""

AUTO, DENSE, FUSED, KERNELS = "auto", "dense", "fused", "kernels"
EXPERTS = (AUTO, KERNELS, FUSED, DENSE)
"""What computes experts: kernels between engines, or one operator a layer (`ort-cuda`), the chosen
ones; or the engine, all of them."""

CHOSEN, STANDARD = "chosen", "standard"
DIALECTS = (CHOSEN, STANDARD)
"""How `ort-cpu` writes experts: only the chosen ones compute; or as they were exported."""


def silent(what: str, done: int, total: int) -> None:
    """A `Report` nobody reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """Options of one build; all but `force` are for targets that fix their shapes (`rtx`, `trt`).

    Attributes:
        force: Build again although a fitting engine is there.
        sms: Compute capabilities to build for ahead of time, e.g. (86, 89); empty for the builder's
            own choice.
        max_context: Longest text, prompt and answer; None for 4096 or the model's own limit,
            whichever is less.
        max_build_memory: Bytes the build of one engine may need at its peak, None for no bound; a
            tower that holds more weights inside is cut into segments.
        weights: `inputs` for engines that read their weights from the bundle's data files, but for
            those that the library takes as constants only; `inside` for engines that hold them all.
        segments: Engines a tower is cut into, so that it can be spread over so many devices.
        experts: `kernels` for programs that end where experts begin, with kernels for the chosen
            ones between them; `dense` for engines that compute every expert for every token; `auto`
            for kernels where there are such for these experts and every compute capability, else
            dense with the reason in the record.
        allow_expanded: Keep engines of `rtx` whose passes expand stacked experts in device memory.
        dialect: Of `ort-cpu`: `chosen` for engines in which only the chosen experts compute,
            `standard` for the exported graph.
        use_cache: Take engines that were built before from the cache, and keep new ones there.
        cache: Its folder; None for the bundle's own, where an engine and its entry are one file.
        cache_bytes: Bytes that cached engines no target uses may take.
    """

    force: bool = False
    sms: tuple[int, ...] = ()
    max_batch: int = DEFAULT_MAX_BATCH
    max_context: int | None = None
    max_build_memory: int | None = None
    weights: str = INPUTS
    segments: int = 1
    experts: str = AUTO
    allow_expanded: bool = False
    dialect: str = CHOSEN
    use_cache: bool = True
    cache: Path | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_context", "max_build_memory", "segments"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} cannot be {value}",
                    found=f"{value}; allowed: 1 and more",
                    do=f"pass a positive {flag}",
                )
        for name, allowed in (("weights", PLACES), ("experts", EXPERTS), ("dialect", DIALECTS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"--{name} cannot be {getattr(self, name)!r}",
                    found=f"allowed: {', '.join(allowed)}",
                    do="choose one of them",
                )
        if self.experts == KERNELS and self.segments > 1:
            raise ConfigError(
                "--segments is for engines that compute their experts",
                found=f"--experts {KERNELS} with --segments {self.segments}; "
                "towers are cut at every layer of experts already",
                do="leave --segments out: the programs are spread over any number of devices",
            )
        if self.cache_bytes < 0:
            raise ConfigError(
                f"--cache-size cannot be {self.cache_bytes}",
                found="it is negative",
                do="pass e.g. --cache-size 20G, or 0",
            )


def engine_record(
    bundle: Bundle, target: str, library: dict[str, str], **facts: Any
) -> EngineRecord:
    """A record of engines that are whole graphs and read the bundle's weights, but for `facts`."""
    stated = {
        "dtype": bundle.dtype,
        "weights": {name: file + DATA_SUFFIX for name, file in GRAPH_FILES.items()},
    }
    graphs = {name: bundle.program_identity(name) for name in GRAPH_FILES}
    return EngineRecord(target=target, library=library, graphs=graphs, **{**stated, **facts})


class BuildPlan(Protocol):
    """What a build would make of a bundle on this machine, decided once for dry run and build."""

    def keeps(self, record: EngineRecord) -> bool:
        """Whether sound engines that are already there are what is asked for."""
        ...

    def describe(self) -> list[str]:
        """What a build would do, a line each, without doing it; BuildError if it cannot."""
        ...

    @property
    def needed_bytes(self) -> int:
        """Disk space the engines will take; BuildError if they cannot be built."""
        ...

    def build(self, folder: Path, *, report: Report) -> EngineRecord:
        """Writes the engines into an empty folder, which the caller publishes; their record."""
        ...


class EngineBuilder(Protocol):
    """Turns a bundle's graphs into the engines of one target."""

    def library(self) -> dict[str, str]:
        """Name and version of the library the engines are tied to."""
        ...

    def asked(self, bundle: Bundle, config: BuildConfig) -> str:
        """A digest of all that decides a build, without reading graphs; empty if only a plan knows.

        Where `build.json` says the same, its engines are kept.
        """
        ...

    def plan(self, bundle: Bundle, config: BuildConfig) -> BuildPlan:
        """What a build would make. Nothing is read or refused before the plan is asked."""
        ...
