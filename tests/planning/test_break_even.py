"""Where diffusion and autoregression take equally long, and the table of it in the documents."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.source import ROOT
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.config.model import parse_model_config
from twotower.planning import GPUS, PlanOptions, gpus_named
from twotower.planning.break_even import ROWS, break_even_table, break_evens
from twotower.planning.pass_cost import pass_costs

PUBLISHED = parse_model_config(PUBLISHED_CONFIG, "published")
KERNELS = PlanOptions(target="trt")


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


def test_the_document_has_the_table_that_the_code_makes() -> None:
    (gpu,) = gpus_named("H200")
    table = "\n".join(break_even_table(PUBLISHED, KERNELS, gpu))
    assert f"\n\n{table}\n\n" in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8"), (
        f"docs/planning.md should have\n{table}"
    )
