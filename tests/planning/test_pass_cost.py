"""What passes read and compute, against counts that are made in another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.published import PUBLISHED
from tests.helpers.source import ROOT
from twotower.planning import GPUS, GpuModel, PlanOptions, gpus_named
from twotower.planning.devices import device_needs
from twotower.planning.expert_path import distinct_experts
from twotower.planning.pass_cost import ROWS, PassCost, break_evens, pass_costs
from twotower.planning.working_memory import state_bytes
from twotower.units import format_bytes

KERNELS = PlanOptions(target="trt")
DENSE = replace(KERNELS, expert_path="dense")
EXPERTS = 128 * 2 * 1856 * 2688 * 23
"""Weights of a tower's routed experts."""

REST = 23 * (2688 * 10304 + 4096 * 2688 + 6144 * 4) + 6 * (2 * 2688 * 4096 + 2 * 2688 * 256)
REST += 23 * (128 * 2688 + 2 * 2688 * 3712)
"""Of Mamba, attention, routers and shared experts: what every token is multiplied with."""


def denoising(options: PlanOptions, rows: int | None = None) -> PassCost:
    cost = pass_costs(PUBLISHED, options, rows).denoising
    assert cost is not None
    return cost


@pytest.mark.parametrize("tokens", [1, 2, 16, 128, 512])
def test_distinct_experts_are_those_that_even_routing_chooses(tokens: int) -> None:
    """Against draws: every token takes 6 of 128, without taking one twice."""
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(300):
        chosen = np.argpartition(rng.random((tokens, 128)), 6, axis=1)[:, :6]
        counts.append(len(np.unique(chosen)))
    assert distinct_experts(PUBLISHED, tokens) == pytest.approx(np.mean(counts), rel=0.01)


def test_a_dense_pass_reads_all_weights_but_the_embedding() -> None:
    single = replace(DENSE, max_batch=1, max_context=1)
    moved = pass_costs(PUBLISHED, single)
    (alone,) = device_needs(PUBLISHED, single)
    embeddings = 2 * 2 * 131072 * 2688
    state = state_bytes(PUBLISHED, single)
    written = state.per_row + state.per_token
    both = denoising(single).nbytes + moved.ar_step.nbytes
    assert both == alone.weights - embeddings + 2 * state.read + written
    head = 2 * 131072 * 2688
    assert moved.ar_step.nbytes - moved.extension.nbytes == head - 15 * state.per_token, (
        "no head; 16 positions are written"
    )
    assert pass_costs(PUBLISHED, replace(single, mode="ar")).denoising is None


@pytest.mark.parametrize(("rows", "tokens"), [(1, 16), (8, 128), (32, 512)])
def test_a_pass_of_kernels_reads_the_distinct_experts(rows: int, tokens: int) -> None:
    read = 128 * (1 - (1 - 6 / 128) ** tokens)
    dense, chosen = denoising(DENSE, rows), denoising(KERNELS, rows)
    assert (chosen.tokens, chosen.experts, dense.experts) == (tokens, pytest.approx(read), 128)
    assert dense.nbytes - chosen.nbytes == pytest.approx(
        2 * EXPERTS * (1 - read / 128), rel=1e-6, abs=2
    )
    step, every = (pass_costs(PUBLISHED, o, rows).ar_step for o in (KERNELS, DENSE))
    assert step.experts == pytest.approx(128 * (1 - (1 - 6 / 128) ** rows))
    assert every.nbytes - step.nbytes == pytest.approx(
        2 * EXPERTS * (1 - 6 / 128) ** rows, rel=1e-6
    )


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_products_are_those_of_the_chosen_pairs(rows: int) -> None:
    """By hand: two operations a weight and token, four a head's number and position."""
    head, scores = 131072 * 2688, 4 * 6 * 4096 * 4352
    for options, share in ((KERNELS, 6 / 128), (DENSE, 1.0)):
        costs, tokens = pass_costs(PUBLISHED, options, rows), 16 * rows
        by_token = 2 * (REST + share * EXPERTS) + scores
        assert denoising(options, rows).flops == pytest.approx(
            tokens * (by_token + 2 * head), rel=1e-3
        )
        assert costs.extension.flops == pytest.approx(tokens * by_token, rel=1e-3)
        assert costs.ar_step.flops == pytest.approx(rows * (by_token + 2 * head), rel=1e-3)


@given(rows=st.integers(1, 64), experts=st.sampled_from([None, "int8", "fp8", "int4", "nvfp4"]))
def test_choosing_never_costs_more(rows: int, experts: str | None) -> None:
    few, every = (
        pass_costs(PUBLISHED, replace(o, experts=experts), rows) for o in (KERNELS, DENSE)
    )
    for kind in ("ar_step", "extension", "denoising"):
        chosen, dense = getattr(few, kind), getattr(every, kind)
        assert chosen is not None
        assert dense is not None
        assert chosen.nbytes <= dense.nbytes
        assert chosen.flops < dense.flops
        assert chosen.experts <= dense.experts == 128
        assert chosen.expanded == 0


def test_expanded_experts_are_read_written_and_read_again() -> None:
    """As bundles of `int8-weights` hold them, and of `int8`, whose inputs have 8 bits too."""
    single = replace(DENSE, target="rtx", max_batch=1, max_context=1)
    floats = pass_costs(PUBLISHED, single)
    stored = EXPERTS + 2 * EXPERTS // 64  # a bfloat16 scale for 64
    weights = replace(single, formats=(("routed_expert", "int8"),))
    moved = pass_costs(PUBLISHED, weights)
    assert denoising(weights).expanded == moved.ar_step.expanded == 4 * EXPERTS
    assert (
        denoising(weights).nbytes == denoising(single).nbytes - 2 * EXPERTS + stored + 4 * EXPERTS
    )
    assert moved.ar_step.nbytes == floats.ar_step.nbytes - 2 * EXPERTS + stored + 4 * EXPERTS
    fused = denoising(replace(weights, rounded=("routed_expert",)))
    rows = 2 * 128 * (1856 + 2688) * 23  # a bfloat16 scale a row
    assert fused.expanded == 0
    assert fused.nbytes == denoising(single).nbytes - 2 * EXPERTS + EXPERTS + rows


def test_kernels_dequantize_in_registers_and_a_cpu_expands_floats_only() -> None:
    formats = (("routed_expert", "int8"),)
    stored = EXPERTS + 2 * EXPERTS // 64
    kernels = denoising(replace(KERNELS, max_batch=1, formats=formats))
    assert kernels.expanded == 0
    share = distinct_experts(PUBLISHED, 16) / 128
    floats = denoising(replace(KERNELS, max_batch=1))
    assert floats.nbytes - kernels.nbytes == pytest.approx(share * (2 * EXPERTS - stored), rel=1e-6)
    cpu = PlanOptions(target="ort-cpu", max_batch=1)
    assert denoising(replace(cpu, formats=formats)).expanded == 0, (
        "integers are multiplied as they are stored"
    )
    floats = denoising(replace(cpu, formats=(("routed_expert", "fp8"),)))
    assert floats.expanded == pytest.approx(share * 8 * EXPERTS, rel=1e-6), (
        "float32, written and read"
    )


def test_fused_experts_read_what_kernels_read() -> None:
    for experts in (None, "int4"):
        fused = replace(KERNELS, target="ort-cuda", experts=experts)
        kernels = replace(KERNELS, experts=experts)
        for rows in (1, 8):
            assert pass_costs(PUBLISHED, fused, rows) == pass_costs(PUBLISHED, kernels, rows)


def test_eight_bit_products_are_counted_where_engines_have_them() -> None:
    """Kernels read their tokens as they are, and so multiply 16 bits whatever the weights."""
    dense, kernels = (denoising(replace(o, experts="fp8")) for o in (DENSE, KERNELS))
    assert dense.flops_8bit == pytest.approx(2 * 128 * EXPERTS)
    assert kernels.flops_8bit == 0
    gpu = GpuModel("some", 10**12, 90, 10**15, flops=10**15)
    assert dense.seconds(gpu) == pytest.approx((dense.flops - dense.flops_8bit / 2) / 1e15)
    assert dense.bound_by_arithmetic(gpu)


def test_time_is_the_longer_of_memory_and_products() -> None:
    cost = PassCost(tokens=1, experts=1, nbytes=10**9, expanded=0, flops=1e12, flops_8bit=0)
    memory = GpuModel("a", 1, 90, 10**9, flops=1e13)
    products = GpuModel("b", 1, 90, 10**10, flops=1e12)
    assert (cost.seconds(memory), cost.bound_by_arithmetic(memory)) == (1.0, False)
    assert (cost.seconds(products), cost.bound_by_arithmetic(products)) == (1.0, True)
    assert cost.seconds(GpuModel("c", 1, 90)) is None
    assert cost.seconds(GpuModel("d", 1, 90, 10**9)) == 1.0, (
        "without a rate of products memory alone counts"
    )


@pytest.mark.parametrize("experts", [None, "int4", "fp8"])
@pytest.mark.parametrize("path", ["auto", "dense"])
def test_both_modes_take_equally_long_there(experts: str | None, path: str) -> None:
    options = replace(KERNELS, experts=experts, expert_path=path)
    for gpu in GPUS:
        for rows, passes in break_evens(PUBLISHED, options, gpu).items():
            costs = pass_costs(PUBLISHED, options, rows)
            assert costs.denoising is not None
            denoise, extend, step = (
                c.seconds(gpu) or 0.0 for c in (costs.denoising, costs.extension, costs.ar_step)
            )
            assert passes * denoise + extend == pytest.approx(16 * step)


def test_dense_experts_flatter_diffusion_at_one_row_and_hurt_it_at_many() -> None:
    """A step of one row pays for 128 experts; 32 rows pay for products nobody needs."""
    (gpu,) = gpus_named("H200")
    chosen, dense = (
        break_evens(PUBLISHED, replace(KERNELS, expert_path=path), gpu)
        for path in ("auto", "dense")
    )
    assert tuple(chosen) == tuple(dense) == ROWS == (1, 8, 32)
    assert 1.5 < chosen[1] < 2.5 < 14 < dense[1] < 16
    assert dense[32] < 0.6 * chosen[32]
    assert chosen[1] < chosen[8] < chosen[32] < 16


def test_only_the_context_tower_breaks_even_with_nothing() -> None:
    assert break_evens(PUBLISHED, replace(KERNELS, mode="ar"), GPUS[0]) == {}


def test_the_document_has_these_figures() -> None:
    """Its table of passes by format of the experts and rows: chosen experts beside dense ones."""
    (gpu,) = gpus_named("H200")

    def told(cost: PassCost) -> str:
        star = "\\*" if cost.bound_by_arithmetic(gpu) else ""
        size, ms = format_bytes(cost.nbytes), 1e3 * (cost.seconds(gpu) or 0)
        return f"{size}, {cost.flops / 1e12:.3g} TFLOP: {ms:.2f} ms{star}"

    document = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for name in (None, "int4", "fp8"):
        chosen, dense = (replace(o, experts=name) for o in (KERNELS, DENSE))
        for rows in ROWS:
            few, every = (pass_costs(PUBLISHED, o, rows) for o in (chosen, dense))
            first, last = (break_evens(PUBLISHED, o, gpu)[rows] for o in (chosen, dense))
            read = f"{denoising(chosen, rows).experts:.1f} of 128"
            cells = [name or "bfloat16", f"{rows}", read, told(denoising(chosen, rows))]
            cells += [told(few.extension), told(few.ar_step), f"**{first:.1f}**"]
            cells += [told(denoising(dense, rows)), told(every.ar_step), f"{last:.1f}"]
            assert f"\n| {' | '.join(cells)} |\n" in document
