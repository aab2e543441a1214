"""Hand-over buffers between the steps of a tower: one set a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from twotower.bundle import EngineFile
from twotower.dtypes import carried_dtype
from twotower.spec import (
    CONDITIONING,
    EXPERTS_IN,
    EXPERTS_OUT,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    SHARES,
)

_HALVES: Mapping[str, int] = {RESIDUAL_IN: 0, RESIDUAL_OUT: 1}
"""Which half of the residual stream's two buffers a name means: a program's own or the next one's.

They alternate, because a program reads one while it writes the next.
"""

_SINGLE = (CONDITIONING, EXPERTS_IN, SHARES, EXPERTS_OUT)
HANDED = (*_HALVES, *_SINGLE)
"""Everything that is handed over, by its names."""

_TAKEN = (RESIDUAL_IN, CONDITIONING, EXPERTS_OUT)
"""What a program takes over from those before it, when it is on another device than they are."""


@dataclass(frozen=True, slots=True)
class Handover:
    """The hand-over buffers on one device, by name: the address of each, or of its two halves."""

    addresses: Mapping[str, tuple[int, ...]]

    def address(self, name: str, program: int) -> int:
        """Where program number `program` of its tower finds a tensor.

        The experts after a program find theirs where the program does, and write where the next
        reads.
        """
        if name in _HALVES:
            return self.addresses[RESIDUAL_IN][(program + _HALVES[name]) % 2]
        return self.addresses[name][0]


def buffer_sizes(
    programs: Iterable[EngineFile], sizes: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Number and bytes of a tower's hand-over buffers, by name, at the axes' greatest `sizes`."""
    out: dict[str, tuple[int, int]] = {}
    for part in programs:
        known = with_tokens(part, sizes)
        for spec in (*part.inputs, *part.outputs):
            if spec.name in HANDED:
                buffer, count = (RESIDUAL_IN, 2) if spec.name in _HALVES else (spec.name, 1)
                nbytes = prod(spec.shape(known)) * carried_dtype(spec.dtype).itemsize
                out[buffer] = (count, max(nbytes, out.get(buffer, (0, 0))[1]))
    return out


def handed_bytes(part: EngineFile, sizes: Mapping[str, int]) -> dict[str, int]:
    """What a program takes over from those before it, in bytes by name."""
    specs = [spec for spec in part.inputs if spec.name in _TAKEN]
    return {
        spec.name: prod(spec.shape(sizes)) * carried_dtype(spec.dtype).itemsize for spec in specs
    }


def with_tokens(part: EngineFile, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes with N, the number of tokens, of a program that ends where experts begin."""
    experts = next((spec for spec in part.outputs if spec.name == EXPERTS_IN), None)
    if experts is None:
        return dict(sizes)
    return {**sizes, "N": prod(experts.shape(sizes)[:-1])}
