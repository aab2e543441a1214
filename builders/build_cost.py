"""What a build takes by measured formulas, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from twotower.errors import BuildError
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER
from twotower.units import format_bytes

# Programs that hold no weights: bytes to begin with, and for each layer. TensorRT for RTX 1.7, all
# profiles, published widths, 6 to 52 layers in the published order. How many compute capabilities
# are listed makes no difference; smaller widths take a little less.
_PROGRAM_BYTES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        CONTEXT: (13_000_000, 700_000),
        CONTEXT_HEAD: (700_000, 0),
        DENOISER: (4_600_000, 250_000),
    }
)
_SECONDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        CONTEXT: (1.0, 1.5),
        CONTEXT_HEAD: (1.0, 0.0),
        DENOISER: (1.0, 0.5),
    }
)
_PROFILES: Mapping[str, int] = MappingProxyType({CONTEXT: 3, CONTEXT_HEAD: 1, DENOISER: 1})

_MEMORY_BASE, _MEMORY_LAYER = 275_000_000, 16_000_000
"""The library with its compiler, and what it keeps of a layer."""

_MEMORY_FACTOR = 3.05
"""Of the weights an engine holds: the mapped file, the compiler's copy and the engine."""

_UNPACKED_FACTOR = 5.8
"""Of the largest 4-bit weight: the compiler expands one at a time to full width.

With this, and 300 MB for the library, the memory of 20 engines at published widths that hold 0.4 to
4.2 GB in bfloat16, int8 or int4 was planned 2 to 23 % too high, and none too low; the process of a
build has lost more than 25 MB since, in modules it no longer imports.
"""

_SECONDS_BYTE, _SECONDS_BYTE_PACKED = 4.5e-9, 23e-9
"""Of weights an engine holds, in the page cache; 4-bit ones are laid out anew for every profile."""


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Weight bytes of a graph by layer.

    Attributes:
        before: Of the embedding and, in the denoiser, the conditioning.
        after: Of the final norm and the head.
    """

    layers: tuple[int, ...]
    before: int
    after: int
    largest_packed: int = 0

    @property
    def total(self) -> int:
        return self.between(0, len(self.layers))

    def between(self, first: int, end: int) -> int:
        """Bytes of the layers [first, end), with what comes before the first and after the last."""
        out = sum(self.layers[first:end])
        if first == 0:
            out += self.before
        if end >= len(self.layers):
            out += self.after
        return out

    def build_memory(self, first: int, end: int) -> int:
        """Peak bytes of memory the build of an engine of the layers [first, end) needs."""
        held = self.between(first, end)
        return build_memory(held, end - first, largest_packed=self.largest_packed)


def build_memory(held: int, layers: int, *, largest_packed: int = 0) -> int:
    """Peak bytes of memory of an engine's build.

    `held` counts weights inside the engine; those it reads as inputs cost nothing. `largest_packed`
    is the largest 4-bit weight among them.
    """
    inside = _MEMORY_FACTOR * held + (_UNPACKED_FACTOR * largest_packed if held else 0)
    return round(_MEMORY_BASE + _MEMORY_LAYER * layers + inside)


def build_seconds(
    graph: str,
    layers: int,
    *,
    held: int = 0,
    packed: int = 0,
) -> float:
    """Seconds of one processor an engine's build takes.

    `held` counts bytes of weights inside, `packed` those of them in 4 bits, scales included.
    """
    start, layer = _SECONDS[graph]
    inside = (held - packed) * _SECONDS_BYTE + packed * _SECONDS_BYTE_PACKED * _PROFILES[graph]
    return start + layer * layers + inside


def program_bytes(graph: str, layers: int) -> int:
    """Bytes on disk of an engine besides the weights it holds."""
    start, layer = _PROGRAM_BYTES[graph]
    return start + layer * layers


def require_bound(needed: Mapping[str, int], bound: int | None) -> None:
    """Refuses a bound below the need of programs between experts, which are not cut further.

    Both are in bytes of memory, `needed` by file. Raises BuildError.
    """
    file = max(needed, key=needed.__getitem__, default=None)
    if file is not None and bound is not None and needed[file] > bound:
        more = f"{-(-needed[file] // 10**8) / 10:g}G or more, or leave it out"
        why = "; programs between experts are cut no further"
        raise too_little_memory(file, needed[file], bound, more=more, why=why)


def too_little_memory(
    what: str, needed: int, bound: int, *, more: str, inside: str = "", why: str = ""
) -> BuildError:
    """The error for a bound that cannot be kept, with the one that can as `more`."""
    about = f"about {format_bytes(needed)}" + ("" if inside else " needed")
    return BuildError(
        f"{what} cannot be built in so little memory",
        found=f"{inside}{about}, {format_bytes(bound)} are allowed{why}",
        do=f"raise --max-build-memory to {more}",
    )


def require_build_memory(
    needed: Mapping[str, int], *, least: int, available: int, bound: int | None
) -> None:
    """Refuses a build that the kernel would kill; an explicit bound is trusted.

    Args:
        needed: Bytes of memory each engine's build takes, by file.
        least: The smallest `--max-build-memory` under which every graph can be cut.
        available: Bytes of memory to be had, 0 if unknown.
        bound: `--max-build-memory`.

    Raises:
        BuildError: an engine needs more than there is.
    """
    if bound is not None or not available or not needed:
        return
    file = max(needed, key=needed.__getitem__)
    if needed[file] <= available:
        return
    if least <= available:
        whole = available // 10**9
        cut = whole if least <= whole * 10**9 else -(-least // 10**8) / 10
        do = f"add --max-build-memory {cut:g}G, which cuts towers into several engines"
    else:
        do = (
            f"build on a machine with {format_bytes(least)} of free memory or more (the largest "
            f"single layer needs that), or add --max-build-memory {-(-least // 10**9)}G to build "
            "with swap all the same"
        )
    have = f"{format_bytes(available)} available"
    raise BuildError(
        f"the build of {file} does not fit this machine's memory",
        found=f"about {format_bytes(needed[file])} needed at its peak, {have}",
        do=do,
    )
