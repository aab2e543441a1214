"""An engine that expands stacked experts is refused by name and figure; whatever else is let through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.errors import fails
from tests.helpers.rtx_program_text import Described, Launch, program
from twotower.builders.trt.engine_inspector import expands_experts, require_fused
from twotower.builders.trt.rtx_program.analysis import summarize_programs
from twotower.builders.trt.rtx_program.read import read_program_text
from twotower.bundle import EngineFile, EngineRecord, Profile
from twotower.errors import BuildError

ENGINE = EngineFile("denoiser.engine", (0, 2), (), (), (Profile("denoise", {}),))


def facts(*dims: int, layers: int = 1) -> dict[str, Any]:
    """What a build observes of an engine that dequantizes a weight of that shape in `layers` layers."""
    tensors = [Described("q", dims, "int8", "p-consts"), Described("w", dims, "bf16", "scratch_1")]
    nodes = [f"layers.{i}.moe/DequantizeLinear" for i in range(layers)]
    launches = [Launch("__myl_CastMul", ["q"], ["w"], [node]) for node in nodes]
    text = program(inputs=["tokens.1"], tensors=tensors, launches=launches).text()
    return {"inspector": summarize_programs([read_program_text(text)])}


def record(observed: dict[str, Any]) -> EngineRecord:
    none: Any = {name: {} for name in ("library", "graphs", "weights", "files")}
    report = {"engines": {"a": observed}}
    return EngineRecord(target="rtx", dtype="bfloat16", report=report, **none)


def test_stacked_experts_are_named_with_what_they_cost_and_what_to_do() -> None:
    observed = facts(8, 640, 320, layers=2)
    with fails(
        BuildError,
        what="denoiser.engine expands the experts of 2 layer(s)",
        found=(
            "profile denoise writes 6.25 MiB a pass",
            "layers.0.moe, q int8 [8, 640, 320] as bf16",
        ),
        do=("mixed", "--allow-expanded"),
    ):
        require_fused(ENGINE, observed)
    assert expands_experts(record(observed))


@pytest.mark.parametrize(
    "observed",
    [facts(640, 320), {"inspector": {"why_not": "layout 9"}}, {"inspector": {"layers": 3}}, {}],
    ids=[
        "a matrix is reported only",
        "a program that was not read",
        "layers of another library",
        "nothing observed",
    ],
)
def test_whatever_else_is_let_through(observed: dict[str, Any]) -> None:
    require_fused(ENGINE, observed)
    assert not expands_experts(record(observed))


def test_experts_in_few_bits_whose_program_was_not_read_are_refused_where_it_can_be() -> None:
    unread = {"inspector": {"why_not": "layout 9"}}
    holds = replace(ENGINE, constants=("denoiser_tower.layers.1.mixer.experts.up_proj.weight",))
    with fails(BuildError, "nobody can tell", found="layout 9"):
        require_fused(holds, unread, readable=True)
    require_fused(holds, unread)
    require_fused(ENGINE, unread, readable=True)
