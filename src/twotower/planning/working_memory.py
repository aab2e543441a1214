"""What generating texts keeps in memory: weights, state and scratch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from twotower.builders.profiles import greatest_rows
from twotower.config.model import ModelConfig
from twotower.dtypes import item_bytes
from twotower.planning.expert_path import expert_path, experts_are_expanded, outside_engines
from twotower.planning.plan_options import (
    TENSORRT,
    PlanOptions,
    capacity_of,
    engine_dtype,
    formats_of,
    rounded_of,
)
from twotower.planning.scratch import Scratch, Shapes, scratch
from twotower.planning.weights import GraphWeights, graph_weights
from twotower.spec import CONTEXT, CONTEXT_HEAD, state_tensors


@dataclass(frozen=True, slots=True)
class State:
    """Bytes a row keeps between passes.

    Keys and values per position, and convolution and SSM state whatever the length; of `rows` rows
    with `capacity` positions each.
    """

    per_token: int
    per_row: int
    capacity: int
    rows: int

    def to_json(self) -> dict[str, int]:
        """Plain data, with the total."""
        return {**asdict(self), "total": self.total}

    @property
    def read(self) -> int:
        """One copy of all of it."""
        return self.rows * (self.per_token * self.capacity + self.per_row)

    @property
    def total(self) -> int:
        """As it lies in memory: fixed states have two alternating buffers, keys and values one."""
        return self.rows * (self.per_token * self.capacity + 2 * self.per_row)


def state_bytes(config: ModelConfig, options: PlanOptions) -> State:
    """The context state in the engines' dtype, SSM in float32."""
    tensors = state_tensors(config, engine_dtype(config, options))
    size = {
        s.past.name: math.prod(s.past.shape({"B": 1, "T": 1})) * item_bytes(s.past.dtype)
        for s in tensors
    }
    return State(
        per_token=sum(size[s.past.name] for s in tensors if s.in_place),
        per_row=sum(size[s.past.name] for s in tensors if not s.in_place),
        capacity=capacity_of(config, options),
        rows=options.max_batch,
    )


def needed_weights(config: ModelConfig, options: PlanOptions) -> Mapping[str, GraphWeights]:
    """Weights of the graphs the mode uses."""
    dtype, outside = engine_dtype(config, options), outside_engines(config, options)
    every = graph_weights(config, dtype, formats_of(options), rounded_of(options), outside=outside)
    return (
        every
        if options.mode == "diffusion"
        else {name: every[name] for name in (CONTEXT, CONTEXT_HEAD)}
    )


def tower_scratch(config: ModelConfig, options: PlanOptions) -> dict[str, Scratch]:
    """The estimate for every graph the mode uses."""
    rows = options.max_batch
    shapes = Shapes(
        dtype=engine_dtype(config, options),
        max_batch=greatest_rows(rows) if options.target in TENSORRT else rows,
        capacity=capacity_of(config, options),
        block_size=options.block_size,
        expanded=experts_are_expanded(config, options),
        path=expert_path(config, options).name,
        arenas=options.target not in TENSORRT,
    )
    return {name: scratch(name, config, shapes) for name in needed_weights(config, options)}
