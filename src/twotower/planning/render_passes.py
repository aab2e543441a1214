"""What computes the experts, what passes take and where diffusion breaks even, as aligned text."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.builders.base import DENSE, FUSED, KERNELS
from twotower.kernels import MOST_TOKENS
from twotower.planning.expert_path import CHOSEN, FUSED_SINCE
from twotower.planning.fit import GpuFit
from twotower.planning.pass_cost import PassCost, PassCosts
from twotower.planning.plan import Plan
from twotower.spec import MAX_CHUNK

__all__ = ["aligned", "break_even_lines", "expert_lines", "pass_lines", "pass_notes"]

_EXPERTS = {
    KERNELS: "kernels compute those that a token chose, and read them as they are stored",
    FUSED: "one operator of ONNX Runtime a layer computes those that a token chose",
    CHOSEN: "those that a token chose compute, in the graph",
    DENSE: "dense: all of them compute every token",
}
_OTHER_WAY = {
    KERNELS: "--expert-path dense plans engines that compute all of them",
    FUSED: f"--expert-path dense plans the exported graph, all there is before version {FUSED_SINCE}",
    CHOSEN: "--expert-path dense plans the exported graph (--dialect standard)",
}


def expert_lines(plan: Plan) -> list[str]:
    """What computes the experts, and how to plan the other way."""
    path = plan.experts
    if not path.name:
        return []
    said = _EXPERTS[path.name] + (f", because {path.why}" if path.why else "")
    return [said, *([_OTHER_WAY[path.name]] if path.name in _OTHER_WAY else [])]


def pass_lines(plan: Plan) -> list[str]:
    """Every pass for every number of rows, beside the same with every expert computing."""
    head = ["rows", "pass", "tokens", "experts"][: 4 if plan.experts.name else 3]
    head += ["memory", "products"]
    rows = [[*head, *(["dense: memory", "products"] if plan.dense else [])]]
    for count, costs in plan.passes.items():
        for (name, cost), other in zip(_named(costs), _others(plan, count), strict=True):
            experts = [f"{cost.experts:.1f}"] if plan.experts.name else []
            row = [str(count), name, str(cost.tokens), *experts, *_taken(cost)]
            rows.append([*row, *(_taken(other) if other else ())])
    return aligned(rows, left=(1,))


def break_even_lines(plan: Plan, fits: Sequence[GpuFit]) -> list[str]:
    """A table of GPUs: denoising passes a block at which both modes take equally long."""
    known = [f for f in fits if f.break_even and not f.refused]
    if not known:
        return []
    counts = list(known[0].break_even)
    rows = [["GPU", *(f"{n} row{'s' if n > 1 else ''}" for n in counts)]]
    rows += [[f.gpu.title, *(_passes(f.break_even[n]) for n in counts)] for f in known]
    block = plan.options.block_size
    said = f"diffusion breaks even with AR at N denoising passes a block of {block} tokens"
    return ["", f"{said}, and is faster with fewer, by such bounds:", *aligned(rows, left=(0,))]


def pass_notes(plan: Plan) -> list[str]:
    """What the figures of passes rest on."""
    every = "every pass reads all experts, because the exported graph computes all of them"
    few = "experts: E (1 - (1 - k/E)^N) of E read by N tokens that choose k each, "
    few += "evenly and independently"
    said = [
        "pass, AR step and break-even: lower bounds by arithmetic, not measured: bytes over the",
        "published bandwidth or, where that takes longer (*), products over the published rate",
    ]
    if plan.experts.name:
        said.append(few if plan.experts.chosen_only else every)
    if plan.experts.name == FUSED:
        said.append("fused experts have never run on a GPU")
    if plan.experts.name == KERNELS:
        said.append("the kernels have never run on a GPU")
        most = MOST_TOKENS // MAX_CHUNK
        if max(plan.passes) > most:
            limit = f"the kernels take {MOST_TOKENS} tokens, {most} chunks of a prompt"
            said.append(f"more than {most} rows are arithmetic: {limit}")
    return said


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Lines of a table; columns are flush right but for those named."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        placed = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)]
        lines.append("  ".join(placed).rstrip())
    return lines


def _named(costs: PassCosts) -> list[tuple[str, PassCost]]:
    named = [("AR step", costs.ar_step), ("block extension", costs.extension)]
    return named + ([("denoising pass", costs.denoising)] if costs.denoising else [])


def _others(plan: Plan, rows: int) -> list[PassCost | None]:
    if plan.dense:
        return [cost for _, cost in _named(plan.dense[rows])]
    return [None] * len(_named(plan.passes[rows]))


def _taken(cost: PassCost) -> tuple[str, str]:
    size = f"{cost.nbytes / 1e9:.1f} GB" if cost.nbytes >= 1e8 else f"{cost.nbytes / 1e6:.1f} MB"
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if cost.flops >= 0.1 * scale:
            return size, f"{cost.flops / scale:.2f} {unit}"
    return size, f"{cost.flops / 1e6:.2f} MFLOP"


def _passes(number: float) -> str:
    """Below one pass a block nothing is to be won."""
    return f"{number:.1f}" if number >= 1 else "never"
