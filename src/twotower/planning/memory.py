"""What generating texts keeps in memory, weights, state and scratch, and what a pass reads of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from twotower.builders.profiles import greatest_rows
from twotower.config.model import ModelConfig
from twotower.planning.options import (
    TENSORRT,
    PlanOptions,
    capacity_of,
    engine_dtype,
    experts_are_expanded,
    formats_of,
    rounded_of,
)
from twotower.planning.scratch import Scratch, Shapes, scratch
from twotower.planning.weights import GraphWeights, expert_bytes, graph_weights, item_bytes
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, state_tensors

__all__ = [
    "State",
    "Traffic",
    "needed_weights",
    "state_bytes",
    "tower_scratch",
    "traffic",
]


@dataclass(frozen=True, slots=True)
class State:
    """Bytes a row keeps between passes.

    Attributes:
        per_token: Keys and values of one position.
        per_row: Convolution and SSM state, whatever the length.
        capacity: Positions a row gets.
        rows: Rows.
    """

    per_token: int
    per_row: int
    capacity: int
    rows: int

    @property
    def read(self) -> int:
        """One copy of all of it."""
        return self.rows * (self.per_token * self.capacity + self.per_row)

    @property
    def total(self) -> int:
        """As it lies in memory: the states of fixed size alternate between two buffers, keys and values are updated in place."""
        return self.rows * (self.per_token * self.capacity + 2 * self.per_row)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes read and written at least: all of the weights, the experts that no token chose included.

    Attributes:
        denoiser_pass: Of a denoiser pass.
        ar_step: Of a step of autoregression.
        expanded: How much of a denoiser pass, or without a denoiser of a step, is experts written at full width and read again.
    """

    denoiser_pass: int
    ar_step: int
    expanded: int = 0


def state_bytes(config: ModelConfig, options: PlanOptions) -> State:
    """The context state in the engines' dtype, SSM in float32."""
    tensors = state_tensors(config, engine_dtype(config, options))
    size = {s.past.name: math.prod(s.past.shape({"B": 1, "T": 1})) * item_bytes(s.past.dtype) for s in tensors}
    return State(
        per_token=sum(size[s.past.name] for s in tensors if s.in_place),
        per_row=sum(size[s.past.name] for s in tensors if not s.in_place),
        capacity=capacity_of(config, options),
        rows=options.max_batch,
    )


def needed_weights(config: ModelConfig, options: PlanOptions) -> Mapping[str, GraphWeights]:
    """Weights of the graphs the mode uses."""
    every = graph_weights(config, engine_dtype(config, options), formats_of(options), rounded_of(options))
    return every if options.mode == "diffusion" else {name: every[name] for name in (CONTEXT, CONTEXT_HEAD)}


def tower_scratch(config: ModelConfig, options: PlanOptions) -> dict[str, Scratch]:
    """The estimate for every graph the mode uses."""
    rows = options.max_batch
    shapes = Shapes(
        dtype=engine_dtype(config, options),
        max_batch=greatest_rows(rows) if options.target in TENSORRT else rows,
        capacity=capacity_of(config, options),
        block_size=options.block_size,
        expanded=experts_are_expanded(options),
    )
    return {name: scratch(name, config, shapes) for name in needed_weights(config, options)}


def traffic(config: ModelConfig, options: PlanOptions) -> Traffic:
    """Bytes of one denoiser pass and of one step of autoregression, all rows together, at full length."""
    weights, state = needed_weights(config, options), state_bytes(config, options)
    written = state.rows * (state.per_row + state.per_token)
    experts = expert_bytes(config, engine_dtype(config, options))
    again = {name: 2 * size if experts_are_expanded(options) else 0 for name, size in experts.items()}
    return Traffic(
        denoiser_pass=weights[DENOISER].read + state.read + again[DENOISER] if DENOISER in weights else 0,
        ar_step=weights[CONTEXT].read + weights[CONTEXT_HEAD].total + state.read + written + again[CONTEXT],
        expanded=again[DENOISER if DENOISER in weights else CONTEXT],
    )
