"""A plan as aligned text: what it takes, and what computes the experts."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.builders.base import DENSE, FUSED, KERNELS
from twotower.config.formats import FUSED_STACKS
from twotower.planning.expert_path import CHOSEN, FUSED_SINCE
from twotower.planning.pass_cost import PassCost, PassCosts
from twotower.planning.plan import EXPORT_MEMORY, Plan
from twotower.planning.plan_options import all_formats
from twotower.units import format_bytes

_EXPERTS = {
    KERNELS: "kernels compute those that a token chose, and read them as they are stored",
    FUSED: "one operator of ONNX Runtime a layer computes those that a token chose",
    CHOSEN: "those that a token chose compute, in the graph",
    DENSE: "dense: all of them compute every token",
}
_OTHER_WAY = {
    KERNELS: "--expert-path dense plans engines that compute all of them",
    FUSED: "--expert-path dense plans the exported graph, all there is before version "
    f"{FUSED_SINCE}",
    CHOSEN: "--expert-path dense plans the exported graph (--dialect standard)",
}


def describe_plan(plan: Plan) -> list[str]:
    """Everything but the GPUs."""
    o, state = plan.options, plan.state
    what = "both towers" if o.mode == "diffusion" else "context tower alone"
    few = "".join(f", {kind} in {name}" for kind, name in all_formats(o))
    rows = f"up to {o.max_batch} rows of {state.capacity} positions"
    lines = under("plan", [f"target {o.target}, {plan.dtype}{few}, {what}; {rows}"])

    count = plan.parameters
    billions = f"{count / 1e9:.3g} billion" if count >= 10**9 else f"{count / 1e6:.3g} million"
    total = bytes_or_none(sum(w.total for w in plan.weights.values()))
    weights = [f"{total}; {billions} parameters in both towers"]
    for name, w in plan.weights.items():
        largest = sorted(w.by_kind.items(), key=lambda kind: -kind[1])[:4]
        kinds = ", ".join(f"{kind} {bytes_or_none(size)}" for kind, size in largest)
        weights.append(f"{name:<14}{bytes_or_none(w.total):>10}   {kinds}")
    lines += under("weights", weights)

    each = f"{format_bytes(state.per_token)} a token and {format_bytes(state.per_row)} a row"
    lines += under(
        "state", [f"{each}; {bytes_or_none(state.total)} for all rows (the latter twice)"]
    )
    lines += under("experts", _expert_lines(plan))
    lines += under("passes", _pass_lines(plan))
    lines += under("scratch", _scratch_lines(plan))

    lines += under("disk", _file_lines(plan))

    if len(plan.devices) > 1:
        devices = []
        for number, d in enumerate(plan.devices):
            devices.append(f"{number}: {bytes_or_none(d.weights):>8}  {d.holds or 'nothing'}")
        if plan.segments > 1:
            devices.append(f"built with --segments {plan.segments}")
        lines += under("devices", devices)
    lines += under("export", [f"{bytes_or_none(EXPORT_MEMORY)} of memory: weights stream"])
    return lines + under("build", _build_lines(plan))


def under(name: str, lines: Sequence[str]) -> list[str]:
    """Lines under one name."""
    return [f"{'' if i else name:<12}{line}" for i, line in enumerate(lines)]


def _scratch_lines(plan: Plan) -> list[str]:
    """Activation memory, and what kernels need besides."""
    room = plan.room
    scratch = [bytes_or_none(room.with_scratch(s.nbytes for s in plan.scratch.values()))]
    for name, s in plan.scratch.items():
        scratch.append(f"{name:<14}{bytes_or_none(s.nbytes):>10}   {s.because}")
    if room.workspace:  # of towers that are cut at their experts
        place = "in the same place" if room.shared else "beside them, each program having its own"
        handed = f"{place}; {bytes_or_none(room.handed)} where programs and experts hand over"
        scratch.append(f"{'kernels':<14}{bytes_or_none(room.workspace):>10}   {handed}")
    return scratch


def _file_lines(plan: Plan) -> list[str]:
    disk = plan.disk
    files = [f"checkpoint {bytes_or_none(disk.checkpoint)}, bundle {bytes_or_none(disk.bundle)}"]
    engines = ", ".join(f"{target} {bytes_or_none(size)}" for target, size in disk.engines.items())
    files.append(f"engines {engines}")
    copies = ", ".join(
        f"{target} {bytes_or_none(size)}" for target, size in disk.copies.items() if size
    )
    if copies:
        files.append(f"of these, weights the bundle holds too: {copies}")
    return files


def _expert_lines(plan: Plan) -> list[str]:
    """What computes the experts, how to plan the other way, and what a pass moves besides."""
    path, lines = plan.experts, []
    if path.name:
        lines.append(_EXPERTS[path.name] + (f", because {path.why}" if path.why else ""))
    if path.name in _OTHER_WAY:
        lines.append(_OTHER_WAY[path.name])
    costs = plan.passes[plan.options.max_batch]
    expanded = (costs.denoising or costs.ar_step).expanded
    if expanded:
        half = bytes_or_none(expanded / 2)
        moved = f"{half} written and {half} read besides, slower than {plan.dtype} experts"
        lines.append(f"expanded in memory in every pass: {moved}")
        lines.append(f"multiplied as they are stored: {FUSED_STACKS}; by kernels, any")
    return lines


def _pass_lines(plan: Plan) -> list[str]:
    """Every pass for every number of rows, beside the same with every expert computing."""
    head = ["rows", "pass", "tokens"]
    head += ["experts"] if plan.experts.name else []
    head += ["memory", "products"]
    head += ["dense: memory", "products"] if plan.dense else []
    rows = [head]
    for count, costs in plan.passes.items():
        for name, cost in _named(costs).items():
            row = [str(count), name, str(cost.tokens)]
            row += [f"{cost.experts:.1f}"] if plan.experts.name else []
            row += _taken(cost)
            if plan.dense:
                row += _taken(_named(plan.dense[count])[name])
            rows.append(row)
    return aligned(rows, left=(1,))


def _named(costs: PassCosts) -> dict[str, PassCost]:
    named = {"AR step": costs.ar_step, "block extension": costs.extension}
    if costs.denoising:
        named["denoising pass"] = costs.denoising
    return named


def _taken(cost: PassCost) -> tuple[str, str]:
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if cost.flops >= 0.1 * scale:
            return format_bytes(cost.nbytes), f"{cost.flops / scale:.2f} {unit}"
    return format_bytes(cost.nbytes), f"{cost.flops / 1e6:.2f} MFLOP"


def _build_lines(plan: Plan) -> list[str]:
    """What building takes, and where it can be done."""
    kernels = plan.experts.name == KERNELS
    if not plan.build_peak:
        return ["kernels, which are not counted" if kernels else "nothing is compiled"]
    programs = sum(e.programs for e in plan.engines)
    files = f"{len(plan.engines)} engines"
    files += f" for {programs} programs" if programs > len(plan.engines) else ""
    files += " and kernels, which are not counted" if kernels else ""
    took = f"{bytes_or_none(plan.build_peak)} of memory at the peak, "
    took += f"{duration(plan.build_seconds or 0.0)} of one processor"
    where = "on the GPU that runs it"
    if not plan.held:
        inside = "programs that hold no weights"
        if plan.options.target == "rtx":
            where = "on any x86-64 Linux, a laptop will do; run where it fits"
    else:
        inside = (
            f"{bytes_or_none(plan.held)} of weights inside, which TensorRT takes as constants only"
        )
        if plan.options.target == "rtx":
            where = "on any x86-64 Linux; run where it fits"
        if not plan.options.max_build_memory:
            took += "; --max-build-memory cuts towers"
    return [f"{files}, one after the other: {inside}", took, where]


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Lines of a table; columns are flush right but for those named."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if i in left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def bytes_or_none(nbytes: float) -> str:
    """A size, or `none`."""
    return format_bytes(nbytes) if nbytes else "none"


def duration(seconds: float) -> str:
    """Seconds, or minutes where they are many."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"
