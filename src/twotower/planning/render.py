"""A plan as aligned text: what it takes, what computes the experts, and the table of GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.builders.base import DENSE, FUSED, KERNELS
from twotower.config.formats import FUSED_STACKS
from twotower.errors import ConfigError
from twotower.kernels import MOST_TOKENS
from twotower.planning.devices import LIBRARY_OVERHEAD
from twotower.planning.expert_path import CHOSEN, FUSED_SINCE
from twotower.planning.fit import Alternative, GpuFit
from twotower.planning.load_time import ASSUMED_DISK_RATE
from twotower.planning.pass_cost import PassCost, PassCosts
from twotower.planning.plan import EXPORT_MEMORY, Plan
from twotower.planning.plan_options import all_formats
from twotower.spec import MAX_CHUNK
from twotower.units import format_bytes

__all__ = ["describe_fits", "describe_plan", "refusal"]

_EXPANDS = {
    "rtx": "rtx expands such experts in device memory in every pass",
    "trt": "rtx expands such experts in device memory in every pass, and trt, not tried, "
    "shares its compiler",
    "ort-cuda": "ONNX Runtime dequantizes experts with a kernel of their own in every pass",
}
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
    o, state, disk, room = plan.options, plan.state, plan.disk, plan.room
    what = "both towers" if o.mode == "diffusion" else "context tower alone"
    few = "".join(f", {kind} in {name}" for kind, name in all_formats(o))
    rows = f"up to {o.max_batch} rows of {state.capacity} positions"
    lines = _under("plan", [f"target {o.target}, {plan.dtype}{few}, {what}; {rows}"])

    count = plan.parameters
    billions = f"{count / 1e9:.3g} billion" if count >= 10**9 else f"{count / 1e6:.3g} million"
    total = _size(sum(w.total for w in plan.weights.values()))
    weights = [f"{total}; {billions} parameters in both towers"]
    for name, w in plan.weights.items():
        largest = sorted(w.by_kind.items(), key=lambda kind: -kind[1])[:4]
        kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in largest)
        weights.append(f"{name:<14}{_size(w.total):>10}   {kinds}")
    lines += _under("weights", weights)

    each = f"{format_bytes(state.per_token)} a token and {format_bytes(state.per_row)} a row"
    lines += _under("state", [f"{each}; {_size(state.total)} for all rows (the latter twice)"])
    lines += _under("experts", _expert_lines(plan))
    lines += _under("passes", _pass_lines(plan))

    scratch = [_size(room.with_scratch(s.nbytes for s in plan.scratch.values()))]
    for name, s in plan.scratch.items():
        scratch.append(f"{name:<14}{_size(s.nbytes):>10}   {s.because}")
    if room.workspace:  # of towers that are cut at their experts
        place = "in the same place" if room.shared else "beside them, each program having its own"
        handed = f"{place}; {_size(room.handed)} where programs and experts hand over"
        scratch.append(f"{'kernels':<14}{_size(room.workspace):>10}   {handed}")
    lines += _under("scratch", scratch)

    files = [f"checkpoint {_size(disk.checkpoint)}, bundle {_size(disk.bundle)}"]
    engines = ", ".join(f"{target} {_size(size)}" for target, size in disk.engines.items())
    files.append(f"engines {engines}")
    copies = ", ".join(f"{target} {_size(size)}" for target, size in disk.copies.items() if size)
    if copies:
        files.append(f"of these, weights the bundle holds too: {copies}")
    lines += _under("disk", files)

    if len(plan.devices) > 1:
        devices = []
        for number, d in enumerate(plan.devices):
            devices.append(f"{number}: {_size(d.weights):>8}  {d.holds or 'nothing'}")
        if plan.segments > 1:
            devices.append(f"built with --segments {plan.segments}")
        lines += _under("devices", devices)
    lines += _under("export", [f"{_size(EXPORT_MEMORY)} of memory: weights stream"])
    return lines + _under("build", _build_lines(plan))


def _under(name: str, lines: Sequence[str]) -> list[str]:
    """Lines under one name."""
    return [f"{'' if i else name:<12}{line}" for i, line in enumerate(lines)]


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
        half = _size(expanded / 2)
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
    return _aligned(rows, left=(1,))


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
    took = f"{_size(plan.build_peak)} of memory at the peak, "
    took += f"{_time(plan.build_seconds or 0.0)} of one processor"
    where = "on the GPU that runs it"
    if not plan.held:
        inside = "programs that hold no weights"
        if plan.options.target == "rtx":
            where = "on any x86-64 Linux, a laptop will do; run where it fits"
    else:
        inside = f"{_size(plan.held)} of weights inside, which TensorRT takes as constants only"
        if plan.options.target == "rtx":
            where = "on any x86-64 Linux; run where it fits"
        if not plan.options.max_build_memory:
            took += "; --max-build-memory cuts towers"
    return [f"{files}, one after the other: {inside}", took, where]


def describe_fits(plan: Plan, fits: Sequence[GpuFit]) -> list[str]:
    """The table of GPUs, what would fit those it does not fit, and what the numbers rest on."""
    rows = [["GPU", "fits", "weights", "state", "scratch", "total", "of", "used"]]
    rows[0] += ["pass", "AR step", "load"]
    for f in fits:
        need = f.fullest
        verdict = "no (SM)" if f.refused else "yes" if f.fits else "no"
        sizes = (need.weights, need.state, need.scratch, need.total, f.gpu.memory)
        row = [f.gpu.title, verdict, *map(format_bytes, sizes)]
        row.append(f"{100 * need.total / f.gpu.memory:.0f} %")
        for name, seconds in (("pass", f.pass_seconds), ("step", f.step_seconds)):
            row.append(_milliseconds(seconds) + ("*" if name in f.by_arithmetic else ""))
        rows.append([*row, "-" if f.load is None else _time(f.load.seconds)])
    many = plan.options.max_batch
    lines = ["", f"On the fullest device; times are lower bounds for {many} rows at full length:"]
    lines += _aligned(rows, left=(0, 1))
    lines += _break_even_lines(plan, fits)
    refused = [f for f in fits if f.refused]
    for why in dict.fromkeys(f.refused for f in refused):
        titles = ", ".join(f.gpu.title for f in refused if f.refused == why)
        lines += ["", f"{titles}: {why}"]
    short = [f for f in fits if not f.fits and not f.refused]
    for f in short:
        lines += _instead(f)
    lines.append("")
    if short and plan.left_out:
        lines.append(f"left out    {_why_left_out(plan)}")
    return lines + _notes(plan, fits)


def _break_even_lines(plan: Plan, fits: Sequence[GpuFit]) -> list[str]:
    """A table of GPUs: denoising passes a block at which both modes take equally long."""
    known = [f for f in fits if f.break_even and not f.refused]
    if not known:
        return []
    counts = list(known[0].break_even)
    rows = [["GPU", *(f"{n} row{'s' if n > 1 else ''}" for n in counts)]]
    for f in known:
        passes = [f.break_even[n] for n in counts]
        # Below one pass a block nothing is to be won.
        rows.append([f.gpu.title, *(f"{n:.1f}" if n >= 1 else "never" for n in passes)])
    block = plan.options.block_size
    said = f"diffusion breaks even with AR at N denoising passes a block of {block} tokens"
    return ["", f"{said}, and is faster with fewer, by such bounds:", *_aligned(rows, left=(0,))]


def _instead(f: GpuFit) -> list[str]:
    """What else could be asked for on a GPU that the plan does not fit."""
    possible = [a for a in f.alternatives if a.fits]
    if possible:
        width = max(len(a.flags) for a in possible)
        rows = [f"  {a.flags:<{width}}  {_needs(a)}" for a in possible]
        return ["", f"{f.gpu.title} would fit with", *rows]
    least = min(f.alternatives, key=lambda a: a.needs, default=None)
    found = f"; least: `{least.flags}` {_needs(least)}" if least else ""
    return ["", f"{f.gpu.title}: nothing tried fits{found}"]


def _needs(a: Alternative) -> str:
    """What an alternative takes, with remarks."""
    remarks = [f"made by `twotower quantize --recipe {a.recipe}`"] if a.recipe else []
    if "--mode ar" in a.flags:
        remarks.append("the runtime loads both towers so far")
    return format_bytes(a.needs) + (f" ({'; '.join(remarks)})" if remarks else "")


def _why_left_out(plan: Plan) -> str:
    return f"--experts {', '.join(plan.left_out)}: {_EXPANDS[plan.options.target]}, which is slower"


def _notes(plan: Plan, fits: Sequence[GpuFit]) -> list[str]:
    """What the figures rest on."""
    exact = "weights, state, checkpoint and bundle (but for graphs and tokenizer, a few MiB)"
    library = f"{format_bytes(LIBRARY_OVERHEAD)} for driver and library in every total"
    estimated = [
        "scratch: the tensors alive at once, within 10 % of what programs compiled for rtx",
        "reserve; not held against others",
        f"{library} is an assumption",
        "pass, AR step and break-even: lower bounds by arithmetic, not measured: bytes over the",
        "published bandwidth or, where that takes longer (*), products over the published rate",
    ]
    if plan.experts.chosen_only:
        few = "experts: E (1 - (1 - k/E)^N) of E read by N tokens that choose k each, "
        estimated.append(f"{few}evenly and independently")
    elif plan.experts.name:
        estimated.append(
            "every pass reads all experts, because the exported graph computes all of them"
        )
    if plan.experts.name == FUSED:
        estimated.append("fused experts have never run on a GPU")
    if plan.experts.name == KERNELS:
        estimated.append("the kernels have never run on a GPU")
        most = MOST_TOKENS // MAX_CHUNK
        if max(plan.passes) > most:
            limit = f"the kernels take {MOST_TOKENS} tokens, {most} chunks of a prompt"
            estimated.append(f"more than {most} rows are arithmetic: {limit}")
    if any(f.load for f in fits):
        given = plan.options.disk_rate
        rate = f"{(given or ASSUMED_DISK_RATE) / 1e9:.3g} GB/s"
        source = "as given" if given else "an assumption (--disk-rate)"
        estimated.append(
            f"load: the slower of the disk at {rate}, {source}, and PCIe as published;"
        )
        estimated.append("planned, never measured on a GPU")
    if plan.build_peak:
        estimated.append(
            "build: measured with rtx at published widths (docs/engines.md); trt, never"
        )
        estimated.append("built, also measures kernels on its GPU")
    flags = [a.flags for f in fits for a in f.alternatives]
    if any(f.gpu.count > 1 or len(f.devices) > 1 for f in fits) or "--devices" in " ".join(flags):
        estimated.append(
            "several devices: one tower each on two, of more runs of layers; never run"
        )
    return [*_under("exact", [exact]), *_under("estimated", estimated)]


def refusal(plan: Plan, fits: Sequence[GpuFit]) -> ConfigError:
    """The error of a plan that fits none of the GPUs it was made for."""
    names = ", ".join(f.gpu.title for f in fits)
    found, possible, near = [], [], []
    for f in fits:
        need = f.fullest
        parts = f"weights {_size(need.weights)}, state {_size(need.state)}, "
        parts += f"scratch {_size(need.scratch)}, library {_size(need.overhead)}"
        lacks = f"needs {_size(need.total)} ({parts}), has {_size(f.gpu.memory)}"
        found.append(f"{f.gpu.title}: {f.refused or lacks}")
        title = f"{f.gpu.title}: " if len(fits) > 1 else ""
        for a in f.alternatives:
            if a.fits:
                possible.append(f"{title}`{a.flags}` {_needs(a)}")
            near.append((a.needs, f"on {f.gpu.title} is `{a.flags}` {_needs(a)}"))
    do = "; ".join(possible)
    if not do:
        other = " or --target trt or ort-cuda" if any(f.refused for f in fits) else ""
        do = f"plan for another GPU{other}: --gpu all lists them"
        if near:
            do += f"; the least that was tried {min(near, key=lambda n: n[0])[1]}"
    if plan.left_out:
        do += f"; left out: {_why_left_out(plan)}"
    what = f"the plan for target {plan.options.target} does not fit {names}"
    return ConfigError(what, found="; ".join(found), do=do)


def _aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Lines of a table; columns are flush right but for those named."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if i in left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def _size(nbytes: float) -> str:
    return format_bytes(nbytes) if nbytes else "none"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.1f} us"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
