"""How many denoising passes a block may take before autoregression is faster, by arithmetic."""

from __future__ import annotations

from dataclasses import replace

from twotower.builders.base import DENSE
from twotower.config.model import ModelConfig
from twotower.planning.expert_path import distinct_experts, expert_path
from twotower.planning.gpus import GpuModel
from twotower.planning.pass_cost import PassCost, pass_costs
from twotower.planning.plan_options import PlanOptions
from twotower.runtime.auto import PassTimes, break_even
from twotower.units import format_bytes

ROWS = (1, 8, 32)
"""Rows the passes are planned for, beside those of `max_batch`."""


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


def break_even_table(config: ModelConfig, options: PlanOptions, gpu: GpuModel) -> list[str]:
    """Lines of a Markdown table: passes by format of the experts and rows, chosen and dense."""
    out = [
        "| experts | rows | experts a denoising pass reads | denoising pass | block extension "
        "| AR step | break-even | dense: denoising pass | AR step | break-even |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (None, "int4", "fp8"):
        chosen = replace(options, experts=name)
        dense = replace(chosen, expert_path=DENSE)
        assert expert_path(config, chosen).chosen_only, "the table compares the two"
        for rows in ROWS:
            costs, whole = (pass_costs(config, o, rows) for o in (chosen, dense))
            read = distinct_experts(config, rows * options.block_size)
            even, uneven = (break_evens(config, o, gpu)[rows] for o in (chosen, dense))
            assert costs.denoising is not None
            assert whole.denoising is not None
            cells = (
                name or config.dtype,
                str(rows),
                f"{read:.1f} of {config.n_routed_experts}",
                _told(costs.denoising, gpu),
                _told(costs.extension, gpu),
                _told(costs.ar_step, gpu),
                f"**{even:.1f}**",
                _told(whole.denoising, gpu),
                _told(whole.ar_step, gpu),
                f"{uneven:.1f}",
            )
            out.append("| " + " | ".join(cells) + " |")
    return out


def _told(cost: PassCost, gpu: GpuModel) -> str:
    """`32.9 GiB, 0.11 TFLOP: 7.4 ms`, with a star where arithmetic and not memory decides."""
    star = "\\*" if cost.bound_by_arithmetic(gpu) else ""
    ms = 1e3 * (cost.seconds(gpu) or 0.0)
    return f"{format_bytes(cost.nbytes)}, {cost.flops / 1e12:.3g} TFLOP: {ms:.2f} ms{star}"
