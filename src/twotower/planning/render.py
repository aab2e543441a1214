"""A plan as aligned text: what it takes, and what computes the experts."""

from __future__ import annotations

from twotower.builders.base import DENSE, FUSED, KERNELS
from twotower.config.formats import FUSED_STACKS
from twotower.planning.expert_path import CHOSEN, FUSED_SINCE
from twotower.planning.pass_cost import PassCost, PassCosts
from twotower.planning.plan import EXPORT_MEMORY, Plan
from twotower.planning.plan_options import all_formats
from twotower.report.tables import Column, Table, labelled
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
    lines = labelled("plan", [f"target {o.target}, {plan.dtype}{few}, {what}; {rows}"])

    count = plan.parameters
    billions = f"{count / 1e9:.3g} billion" if count >= 10**9 else f"{count / 1e6:.3g} million"
    total = size_of(sum(w.total for w in plan.weights.values()))
    weights = [f"{total}; {billions} parameters in both towers"]
    for name, w in plan.weights.items():
        largest = sorted(w.by_kind.items(), key=lambda kind: -kind[1])[:4]
        kinds = ", ".join(f"{kind} {size_of(size)}" for kind, size in largest)
        weights.append(f"{name:<14}{size_of(w.total):>10}   {kinds}")
    lines += labelled("weights", weights)

    each = f"{format_bytes(state.per_token)} a token and {format_bytes(state.per_row)} a row"
    lines += labelled("state", [f"{each}; {size_of(state.total)} for all rows (the latter twice)"])
    lines += labelled("experts", _expert_lines(plan))
    lines += labelled("passes", _pass_lines(plan))
    lines += labelled("scratch", _scratch_lines(plan))

    lines += labelled("disk", _file_lines(plan))

    if len(plan.devices) > 1:
        devices = []
        for number, d in enumerate(plan.devices):
            devices.append(f"{number}: {size_of(d.weights):>8}  {d.holds or 'nothing'}")
        if plan.segments > 1:
            devices.append(f"built with --segments {plan.segments}")
        lines += labelled("devices", devices)
    lines += labelled("export", [f"{size_of(EXPORT_MEMORY)} of memory: weights stream"])
    return lines + labelled("build", _build_lines(plan))


def _scratch_lines(plan: Plan) -> list[str]:
    """Activation memory, and what kernels need besides."""
    room = plan.room
    scratch = [size_of(room.with_scratch(s.nbytes for s in plan.scratch.values()))]
    for name, s in plan.scratch.items():
        scratch.append(f"{name:<14}{size_of(s.nbytes):>10}   {s.because}")
    if room.workspace:  # of towers that are cut at their experts
        place = "in the same place" if room.shared else "beside them, each program having its own"
        handed = f"{place}; {size_of(room.handed)} where programs and experts hand over"
        scratch.append(f"{'kernels':<14}{size_of(room.workspace):>10}   {handed}")
    return scratch


def _file_lines(plan: Plan) -> list[str]:
    disk = plan.disk
    files = [f"checkpoint {size_of(disk.checkpoint)}, bundle {size_of(disk.bundle)}"]
    engines = ", ".join(f"{target} {size_of(size)}" for target, size in disk.engines.items())
    files.append(f"engines {engines}")
    copies = ", ".join(f"{target} {size_of(size)}" for target, size in disk.copies.items() if size)
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
        half = size_of(expanded / 2)
        moved = f"{half} written and {half} read besides, slower than {plan.dtype} experts"
        lines.append(f"expanded in memory in every pass: {moved}")
        lines.append(f"multiplied as they are stored: {FUSED_STACKS}; by kernels, any")
    return lines


def _pass_lines(plan: Plan) -> list[str]:
    """Every pass for every number of rows, beside the same with every expert computing."""
    taken = (Column("memory", format_bytes), Column("products", _operations))
    columns: list[Column | str] = [Column("rows"), "pass", Column("tokens")]
    columns += [Column("experts", ".1f")] if plan.experts.name else []
    columns += taken
    columns += [Column("dense: memory", format_bytes), taken[1]] if plan.dense else []
    table = Table(columns)
    for count, costs in plan.passes.items():
        for name, cost in _named(costs).items():
            cells: list[str | float] = [count, name, cost.tokens]
            cells += [cost.experts] if plan.experts.name else []
            cells += [cost.nbytes, cost.flops]
            if plan.dense:
                dense = _named(plan.dense[count])[name]
                cells += [dense.nbytes, dense.flops]
            table.add(*cells)
    return table.text()


def _named(costs: PassCosts) -> dict[str, PassCost]:
    named = {"AR step": costs.ar_step, "block extension": costs.extension}
    if costs.denoising:
        named["denoising pass"] = costs.denoising
    return named


def _operations(flops: float) -> str:
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= 0.1 * scale:
            return f"{flops / scale:.2f} {unit}"
    return f"{flops / 1e6:.2f} MFLOP"


def _build_lines(plan: Plan) -> list[str]:
    """What building takes, and where it can be done."""
    kernels = plan.experts.name == KERNELS
    if not plan.build_peak:
        return ["kernels, which are not counted" if kernels else "nothing is compiled"]
    programs = sum(e.programs for e in plan.engines)
    files = f"{len(plan.engines)} engines"
    files += f" for {programs} programs" if programs > len(plan.engines) else ""
    files += " and kernels, which are not counted" if kernels else ""
    took = f"{size_of(plan.build_peak)} of memory at the peak, "
    took += f"{duration(plan.build_seconds or 0.0)} of one processor"
    where = "on the GPU that runs it"
    if not plan.held:
        inside = "programs that hold no weights"
        if plan.options.target == "rtx":
            where = "on any x86-64 Linux, a laptop will do; run where it fits"
    else:
        inside = f"{size_of(plan.held)} of weights inside, which TensorRT takes as constants only"
        if plan.options.target == "rtx":
            where = "on any x86-64 Linux; run where it fits"
        if not plan.options.max_build_memory:
            took += "; --max-build-memory cuts towers"
    return [f"{files}, one after the other: {inside}", took, where]


def size_of(nbytes: float) -> str:
    """A size, or `none`."""
    return format_bytes(nbytes) if nbytes else "none"


def duration(seconds: float) -> str:
    """Seconds, or minutes where they are many."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"
