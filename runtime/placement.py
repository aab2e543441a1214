"""Which engine goes to which device, and so where every tensor is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower.bundle import EngineFile
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, StateTensor


def place_engines(
    sizes: Mapping[str, Sequence[int]], devices: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """A device for every segment of every graph.

    One device takes everything. Of several the first part goes to the context tower and the rest,
    the larger one of an odd number, to the denoiser, which runs more often; within a part
    consecutive segments share a device, with about as many bytes on each. The context head is where
    the context tower ends.
    """
    half = max(len(devices) // 2, 1)
    context, denoiser = devices[:half], devices[half:] or devices
    placed = {
        CONTEXT: _spread(sizes[CONTEXT], context),
        DENOISER: _spread(sizes[DENOISER], denoiser),
    }
    placed[CONTEXT_HEAD] = (placed[CONTEXT][-1],) * len(sizes[CONTEXT_HEAD])
    return placed


def _spread(sizes: Sequence[int], devices: Sequence[int]) -> tuple[int, ...]:
    """The device in which each segment's middle lies when the bytes are divided evenly."""
    total, before, out = max(sum(sizes), 1), 0, []
    for size in sizes:
        middle = (before + size / 2) / total
        out.append(devices[min(int(middle * len(devices)), len(devices) - 1)])
        before += size
    return tuple(out)


def places_of_tensors(
    engines: Mapping[str, Sequence[EngineFile]],
    placed: Mapping[str, Sequence[int]],
    state: Sequence[StateTensor],
) -> dict[str, tuple[int, ...]]:
    """The devices each tensor is needed on, the one that writes it first.

    A state goes by its name as an input; both its names have the same places.
    """
    past = {t.present.name: t.past.name for t in state}
    places: dict[str, list[int]] = {}
    for graph in (
        CONTEXT,
        CONTEXT_HEAD,
        DENOISER,
    ):  # the context tower, which writes the state, comes first
        for part, device in zip(engines[graph], placed[graph], strict=True):
            for spec in (*part.outputs, *part.inputs):
                devices = places.setdefault(past.get(spec.name, spec.name), [])
                if device not in devices:
                    devices.append(device)
    return {name: tuple(devices) for name, devices in places.items()}
