"""What generating texts keeps in memory: weights, state, scratch, and what kernels need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from twotower.builders.base import KERNELS
from twotower.builders.profiles import greatest_rows
from twotower.bundle import EngineFile
from twotower.config.model import ModelConfig
from twotower.dtypes import item_bytes
from twotower.kernels import scratch_bytes
from twotower.kernels.shape import shape_of
from twotower.planning.expert_path import (
    expert_path,
    expert_step,
    experts_are_expanded,
    outside_engines,
)
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
from twotower.runtime.engines.handover import buffer_sizes
from twotower.spec import (
    CONDITIONING,
    CONTEXT,
    CONTEXT_HEAD,
    EXPERTS_IN,
    EXPERTS_OUT,
    MAX_CHUNK,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    SHARES,
    TensorSpec,
    state_tensors,
)


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


@dataclass(frozen=True, slots=True)
class ExpertRoom:
    """Bytes kernels need besides on every device that runs programs with experts between.

    `workspace` is of the kernels for the most tokens, `handed` of the buffers between programs and
    experts. `shared`: the workspace lies in the engines' scratch; sessions of ONNX Runtime have an
    arena each.
    """

    workspace: int = 0
    handed: int = 0
    shared: bool = True

    def with_scratch(self, engines: Iterable[int]) -> int:
        """Bytes of all of it with the scratch of engines, which run in turn."""
        kernels = (max if self.shared else sum)((self.workspace, *engines))
        return kernels + self.handed


def expert_room(config: ModelConfig, options: PlanOptions) -> ExpertRoom:
    """As the runtime allocates it: for the longest chunk of a prompt, whatever a device runs."""
    if expert_path(config, options).name != KERNELS:
        return ExpertRoom()
    shape = shape_of(expert_step(config, options))
    sizes = {"B": options.max_batch, "L": MAX_CHUNK}
    buffers = buffer_sizes([_program(config, engine_dtype(config, options))], sizes)
    return ExpertRoom(
        workspace=scratch_bytes(shape, options.max_batch * MAX_CHUNK),
        handed=sum(count * nbytes for count, nbytes in buffers.values()),
        shared=options.target in TENSORRT,
    )


def _program(config: ModelConfig, dtype: str) -> EngineFile:
    """A program of the middle of the denoiser: its buffers are the context tower's and one more."""
    names = (RESIDUAL_IN, EXPERTS_OUT, RESIDUAL_OUT, EXPERTS_IN)
    stream = [TensorSpec(name, dtype, ("B", "L", config.hidden_size)) for name in names]
    conditioning = TensorSpec(CONDITIONING, dtype, ("B", 3, config.hidden_size))
    shares = TensorSpec(SHARES, "float32", (config.n_routed_experts, "N"))
    return EngineFile(
        file="",
        layers=(0, 0),
        inputs=(*stream[:2], conditioning),
        outputs=(*stream[2:], shares),
        profiles=(),
    )
