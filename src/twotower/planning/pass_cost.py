"""What passes read and compute, how long a GPU takes at least, and where both modes break even."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.checkpoint.layout import Role
from twotower.config.model import LayerKind, ModelConfig
from twotower.dtypes import item_bytes
from twotower.planning.expert_path import (
    distinct_experts,
    expert_path,
    experts_are_expanded,
    outside_engines,
)
from twotower.planning.gpus import GpuModel
from twotower.planning.plan_options import TENSORRT, PlanOptions, engine_dtype, rounded_of
from twotower.planning.weights import weight_counts
from twotower.planning.working_memory import needed_weights, state_bytes
from twotower.runtime.auto import PassTimes, break_even
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER

ROWS = (1, 8, 32)
"""Rows the passes are planned for, beside those of `max_batch`."""

_ROUTED = Role.ROUTED_EXPERT.value
_OF_TOKENS = (
    Role.MAMBA.value,
    Role.ATTENTION.value,
    Role.ROUTER.value,
    Role.SHARED_EXPERT.value,
    Role.MLP.value,
    Role.HEAD.value,
)
"""Weights that every token is multiplied with; the conditioning meets a row once and is nothing."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """One pass of all rows at full length, at least.

    `experts` are the distinct ones a layer reads, as expected, all if dense. `nbytes` are read and
    written: weights, state, and `expanded` (experts written at full width and read again), but not
    what layers hand on, which a cache may keep. `flops` are multiplications and additions of
    products, attention included; `flops_8bit` those whose factors both have 8 bits.
    """

    tokens: int
    experts: float
    nbytes: int
    expanded: int
    flops: float
    flops_8bit: float

    def seconds(self, gpu: GpuModel) -> float | None:
        """The longer of what memory and matrix units need; None for an unknown GPU."""
        if not gpu.bandwidth:
            return None
        return max(self.nbytes / gpu.bandwidth, self._arithmetic(gpu))

    def bound_by_arithmetic(self, gpu: GpuModel) -> bool:
        """Whether the matrix units need longer than the memory."""
        return bool(gpu.bandwidth) and self._arithmetic(gpu) > self.nbytes / gpu.bandwidth

    def _arithmetic(self, gpu: GpuModel) -> float:
        if not gpu.flops:
            return 0.0
        return (self.flops - self.flops_8bit / 2) / gpu.flops


@dataclass(frozen=True, slots=True)
class PassCosts:
    """The passes that generation is made of.

    The context tower over one token a row with its head, or over a finished block; the denoiser
    over a block, None with the context tower alone.
    """

    ar_step: PassCost
    extension: PassCost
    denoising: PassCost | None


def pass_costs(config: ModelConfig, options: PlanOptions, rows: int | None = None) -> PassCosts:
    """The passes of so many rows, which may exceed `max_batch` (meant by None)."""
    rows, block = rows or options.max_batch, options.block_size
    towers = (_Pass((CONTEXT, CONTEXT_HEAD), rows, 1), _Pass((CONTEXT,), rows, block))
    step, extension = (_cost(config, options, what) for what in towers)
    denoiser = _Pass((DENOISER,), rows, block)
    both = options.mode == "diffusion"
    return PassCosts(
        step,
        extension,
        _cost(config, options, denoiser) if both else None,
    )


def break_evens(config: ModelConfig, options: PlanOptions, gpu: GpuModel) -> dict[int, float]:
    """Denoising passes a block at which both modes take equally long, by rows.

    A block of S tokens takes the denoiser its passes and the context tower one extension, or S
    steps of autoregression; every pass takes its floor, and both modes compute their experts alike.
    Below 1 a block of one pass is slower already. Empty for an unknown GPU and for the context
    tower alone.
    """
    out = {}
    for rows in ROWS:
        costs = pass_costs(config, options, rows)
        if costs.denoising is None or not gpu.bandwidth:
            return {}
        floors = (costs.denoising, costs.extension, costs.ar_step)
        denoise, extend, step = (1e3 * (cost.seconds(gpu) or 0.0) for cost in floors)
        times = PassTimes(denoise_ms=denoise, extend_ms=extend, step_ms=step)
        out[rows] = break_even(times, options.block_size)
    return out


@dataclass(frozen=True, slots=True)
class _Pass:
    """The graphs that run, on so many rows of so many tokens."""

    graphs: tuple[str, ...]
    rows: int
    length: int


def _cost(config: ModelConfig, options: PlanOptions, what: _Pass) -> PassCost:
    rows, tokens = what.rows, what.rows * what.length
    every = config.n_routed_experts
    chosen_only = expert_path(config, options).chosen_only
    experts = distinct_experts(config, tokens) if chosen_only else every
    share = experts / every if every else 0.0
    weights, state = needed_weights(config, options), state_bytes(config, options)
    read = moved = 0
    for graph in what.graphs:
        routed = weights[graph].by_kind.get(_ROUTED, 0)
        read += weights[graph].read - routed + round(share * routed)
        if experts_are_expanded(config, options):
            full = weight_counts(config)[graph].get(_ROUTED, 0)
            moved += round(share * 2 * full * item_bytes(engine_dtype(config, options)))
    kept = rows * (state.per_token * state.capacity + state.per_row)
    context = CONTEXT in what.graphs  # the denoiser reads the state only
    written = rows * (state.per_row + state.per_token * what.length) if context else 0
    flops, flops_8bit = _flops(config, options, what)
    return PassCost(tokens, experts, read + moved + kept + written, moved, flops, flops_8bit)


def _flops(config: ModelConfig, options: PlanOptions, what: _Pass) -> tuple[float, float]:
    """Of all products, and of those of 8-bit numbers: kernels read their tokens as they are."""
    few = rounded_of(options) if options.target in TENSORRT else ()
    few = tuple(kind for kind in few if kind not in outside_engines(config, options))
    chosen = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0
    whole = chosen if expert_path(config, options).chosen_only else 1.0
    total = rounded = 0.0
    for graph in what.graphs:
        counts = weight_counts(config)[graph]
        tokens = what.rows * (1 if graph == CONTEXT_HEAD else what.length)
        for kind in (*_OF_TOKENS, _ROUTED):
            products = 2 * tokens * counts.get(kind, 0) * (whole if kind == _ROUTED else 1.0)
            total += products
            rounded += products if kind in few else 0.0
    return total + _attention(config, options, what), rounded


def _attention(config: ModelConfig, options: PlanOptions, what: _Pass) -> float:
    """Scores of every position of the capacity, and the sums over values."""
    width = config.num_attention_heads * config.head_dim
    layers = config.layers.count(LayerKind.ATTENTION)
    capacity = state_bytes(config, options).capacity
    return 4.0 * what.rows * what.length * width * capacity * layers
