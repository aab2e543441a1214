"""What kernels of experts need besides weights: a workspace, and buffers to hand over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from twotower.builders.base import KERNELS
from twotower.bundle import EngineFile
from twotower.config.model import ModelConfig
from twotower.kernels import scratch_bytes
from twotower.kernels.shape import shape_of
from twotower.planning.expert_path import expert_path, expert_step
from twotower.planning.plan_options import TENSORRT, PlanOptions, engine_dtype
from twotower.runtime.engines.handover import buffer_sizes
from twotower.spec import (
    CONDITIONING,
    EXPERTS_IN,
    EXPERTS_OUT,
    MAX_CHUNK,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    SHARES,
    TensorSpec,
)


@dataclass(frozen=True, slots=True)
class ExpertRoom:
    """Bytes on every device that runs programs with experts between.

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
