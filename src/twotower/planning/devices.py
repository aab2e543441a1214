"""What lies in each device's memory: whole towers, or runs of layers as the runtime places them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from twotower.config.model import LayerKind, ModelConfig
from twotower.planning.engines import placed_pieces
from twotower.planning.plan_options import PlanOptions
from twotower.planning.weights import GraphWeights
from twotower.planning.working_memory import (
    expert_room,
    needed_weights,
    state_bytes,
    tower_scratch,
)
from twotower.runtime.placement import place_engines
from twotower.spec import CONTEXT_HEAD, DENOISER

LIBRARY_OVERHEAD = 1_000_000_000
"""Assumed bytes for the driver's context, the library and its kernels; not measured."""


@dataclass(frozen=True, slots=True)
class DeviceNeed:
    """Bytes in one device's memory, and what lies there."""

    holds: str
    weights: int
    state: int
    scratch: int
    overhead: int = LIBRARY_OVERHEAD

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the total."""
        return {**asdict(self), "total": self.total}

    @property
    def total(self) -> int:
        return self.weights + self.state + self.scratch + self.overhead


@dataclass(frozen=True, slots=True)
class _Piece:
    """An engine on a device: a graph, or some of its layers."""

    graph: str
    layers: tuple[int, int]
    weights: int


def device_needs(config: ModelConfig, options: PlanOptions) -> tuple[DeviceNeed, ...]:
    """What each device holds; scratch is shared, as one graph or kernel runs at a time on it."""
    weights, state = needed_weights(config, options), state_bytes(config, options)
    scratch = {name: s.nbytes for name, s in tower_scratch(config, options).items()}
    placed, room = _placed(config, weights, options), expert_room(config, options)
    out = []
    for pieces in placed:
        # Of the state that of its layers; both towers work on the same.
        layers = {i for piece in pieces for i in range(*piece.layers)}
        kinds = [config.layers[i] for i in layers]
        cached, recurrent = (
            kinds.count(kind) / max(config.layers.count(kind), 1)
            for kind in (LayerKind.ATTENTION, LayerKind.MAMBA)
        )
        row = state.per_token * state.capacity * cached + 2 * state.per_row * recurrent
        graphs = {piece.graph for piece in pieces}
        shared = room.with_scratch(scratch[graph] for graph in graphs) if pieces else 0
        size = sum(piece.weights for piece in pieces)
        out.append(
            DeviceNeed(
                _described(pieces, weights),
                size,
                round(state.rows * row),
                shared,
            )
        )
    return tuple(out)


def _placed(
    config: ModelConfig, weights: Mapping[str, GraphWeights], options: PlanOptions
) -> list[list[_Piece]]:
    """The engines on each device; towers are cut by `twotower build --segments`, or at experts."""
    pieces = {
        name: [_Piece(name, cut, nbytes) for cut, nbytes in placed_pieces(w, config, options)]
        for name, w in weights.items()
    }
    sizes = {name: [piece.weights for piece in parts] for name, parts in pieces.items()}
    if DENOISER in weights:
        places = place_engines(sizes, range(options.devices))
    else:  # as if the devices were the first half of twice as many
        places = place_engines({**sizes, DENOISER: []}, range(2 * options.devices))
    out: list[list[_Piece]] = [[] for _ in range(options.devices)]
    for name, parts in pieces.items():
        for piece, device in zip(parts, places[name], strict=True):
            out[device].append(piece)
    return out


def _described(pieces: list[_Piece], weights: Mapping[str, GraphWeights]) -> str:
    """`both towers`, `context tower`, or which layers of which."""
    parts: dict[str, tuple[int, int]] = {}
    for piece in pieces:  # those of a graph on one device follow one another
        if piece.graph != CONTEXT_HEAD:
            first, end = parts.get(piece.graph, piece.layers)
            parts[piece.graph] = (min(first, piece.layers[0]), max(end, piece.layers[1]))
    whole = {name: (0, len(w.layers)) for name, w in weights.items() if w.layers}
    if len(weights) > 2 and parts == whole:
        return "both towers"
    words = []
    for graph, (first, end) in parts.items():
        all_of_it = (first, end) == whole[graph]
        words.append(f"{graph} tower" if all_of_it else f"{graph} layers {first} to {end - 1}")
    return ", ".join(words)
