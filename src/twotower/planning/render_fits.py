"""The table of GPUs that a plan fits or not, as aligned text, and the refusal of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.builders.base import FUSED, KERNELS
from twotower.errors import ConfigError
from twotower.kernels import MOST_TOKENS
from twotower.planning.devices import LIBRARY_OVERHEAD
from twotower.planning.fit import ASSUMED_DISK_RATE, Alternative, GpuFit
from twotower.planning.plan import Plan
from twotower.planning.render import duration, size_of
from twotower.report.tables import Column, Table, labelled
from twotower.spec import MAX_CHUNK
from twotower.units import format_bytes

_EXPANDS = {
    "rtx": "rtx expands such experts in device memory in every pass",
    "trt": "rtx expands such experts in device memory in every pass, and trt, not tried, "
    "shares its compiler",
    "ort-cuda": "ONNX Runtime dequantizes experts with a kernel of their own in every pass",
}
_SIZES = ("weights", "state", "scratch", "total", "of")


def describe_fits(plan: Plan, fits: Sequence[GpuFit]) -> list[str]:
    """The table of GPUs, what would fit those it does not fit, and what the numbers rest on."""
    sizes = [Column(name, format_bytes) for name in _SIZES]
    times = [
        Column("pass"),
        Column("AR step"),
        Column("load", duration),
    ]
    table = Table(["GPU", "fits", *sizes, Column("used", ".0f", " %"), *times])
    for f in fits:
        need = f.fullest
        verdict = "no (SM)" if f.refused else "yes" if f.fits else "no"
        cells = (need.weights, need.state, need.scratch, need.total, f.gpu.memory)
        bounds = []
        for name, seconds in (("pass", f.pass_seconds), ("step", f.step_seconds)):
            bounds.append(_milliseconds(seconds) + ("*" if name in f.by_arithmetic else ""))
        loading = f.load.seconds if f.load else None
        used = 100 * need.total / f.gpu.memory
        table.add(f.gpu.title, verdict, *cells, used, *bounds, loading)
    many = plan.options.max_batch
    lines = ["", f"On the fullest device; times are lower bounds for {many} rows at full length:"]
    lines += table.text()
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
    table = Table(["GPU", *(Column(f"{n} row{'s' if n > 1 else ''}") for n in counts)])
    for f in known:
        passes = [f.break_even[n] for n in counts]
        # Below one pass a block nothing is to be won.
        table.add(f.gpu.title, *(f"{n:.1f}" if n >= 1 else "never" for n in passes))
    block = plan.options.block_size
    said = f"diffusion breaks even with AR at N denoising passes a block of {block} tokens"
    return ["", f"{said}, and is faster with fewer, by such bounds:", *table.text()]


def _instead(f: GpuFit) -> list[str]:
    """What else could be asked for on a GPU that the plan does not fit."""
    possible = [a for a in f.alternatives if a.fits]
    if possible:
        table = Table(["", ""], [(a.flags, _needs(a)) for a in possible])
        return [
            "",
            f"{f.gpu.title} would fit with",
            *table.text("  "),
        ]
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
    return [*labelled("exact", [exact]), *labelled("estimated", estimated)]


def refusal(plan: Plan, fits: Sequence[GpuFit]) -> ConfigError:
    """The error of a plan that fits none of the GPUs it was made for."""
    names = ", ".join(f.gpu.title for f in fits)
    found, possible, near = [], [], []
    for f in fits:
        need = f.fullest
        parts = f"weights {size_of(need.weights)}, state {size_of(need.state)}, "
        parts += f"scratch {size_of(need.scratch)}, library {size_of(need.overhead)}"
        lacks = f"needs {size_of(need.total)} ({parts}), has {size_of(f.gpu.memory)}"
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


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds >= 1e-4:
        return f"{1e3 * seconds:.1f} ms"
    return f"{1e6 * seconds:.1f} us"
