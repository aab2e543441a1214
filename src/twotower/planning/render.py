"""A plan as aligned text; a GB is 1e9 bytes everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.builders.base import KERNELS
from twotower.config.formats import FUSED_STACKS
from twotower.errors import ConfigError
from twotower.planning.devices import LIBRARY_OVERHEAD
from twotower.planning.fit import Alternative, GpuFit
from twotower.planning.load_time import ASSUMED_DISK_RATE
from twotower.planning.plan import EXPORT_MEMORY, Plan
from twotower.planning.plan_options import all_formats
from twotower.planning.render_passes import (
    aligned,
    break_even_lines,
    expert_lines,
    pass_lines,
    pass_notes,
)

__all__ = ["describe_fits", "describe_plan", "refusal"]

_NOTES = (
    "exact       weights, state, checkpoint and bundle (but for graphs and tokenizer, a few MB)",
    "estimated   scratch: the tensors alive at once, within 10 % of what programs compiled for rtx reserve; not held against others",
    f"            {LIBRARY_OVERHEAD / 1e9:.1f} GB for driver and library in every total is an assumption",
)
_EXPANDS = {
    "rtx": "rtx expands such experts in device memory in every pass",
    "trt": "rtx expands such experts in device memory in every pass, and trt, not tried, shares its compiler",
    "ort-cuda": "ONNX Runtime dequantizes experts with a kernel of their own in every pass",
}
_BUILD_NOTES = (
    "            build: measured with rtx at published widths (docs/engines.md); trt, never built, also measures kernels on its GPU",
)
_WHERE = {
    "rtx": "on any x86-64 Linux, a laptop will do; run where it fits",
    "trt": "on the GPU that runs it",
}


def describe_plan(plan: Plan) -> list[str]:
    """Everything but the GPUs."""
    o, state = plan.options, plan.state
    what = "both towers" if o.mode == "diffusion" else "context tower alone"
    few = all_formats(o)
    experts = f", {', '.join(f'{kind} in {name}' for kind, name in few)}" if few else ""
    rows = [
        (
            "plan",
            f"target {o.target}, {plan.dtype}{experts}, {what}; up to {o.max_batch} rows of {state.capacity} positions",
        ),
        (
            "weights",
            f"{_gb(sum(w.total for w in plan.weights.values()))}; {_parameters(plan.parameters)} parameters in both towers",
        ),
        *(
            ("", f"{name:<14}{_gb(w.total):>10}   {_kinds(plan, name)}")
            for name, w in plan.weights.items()
        ),
        (
            "state",
            f"{_small(state.per_token)} a token and {_small(state.per_row)} a row; {_gb(state.total)} for all rows (the latter twice)",
        ),
        *_under("experts", expert_lines(plan)),
        *_expanded(plan),
        *_under("passes", pass_lines(plan)),
        ("scratch", _gb(plan.room.with_scratch(s.nbytes for s in plan.scratch.values()))),
        *(("", f"{name:<14}{_gb(s.nbytes):>10}   {s.because}") for name, s in plan.scratch.items()),
        *_room(plan),
        ("disk", f"checkpoint {_gb(plan.disk.checkpoint)}, bundle {_gb(plan.disk.bundle)}"),
        (
            "",
            "engines "
            + ", ".join(f"{target} {_gb(size)}" for target, size in plan.disk.engines.items()),
        ),
        *_copies(plan),
        *_devices(plan),
        ("export", f"{_gb(EXPORT_MEMORY)} of memory: weights stream"),
        *_build(plan),
    ]
    return [f"{name:<12}{value}" for name, value in rows]


def _under(name: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    """Lines under one name."""
    return [(name if i == 0 else "", line) for i, line in enumerate(lines)]


def _room(plan: Plan) -> list[tuple[str, str]]:
    """What a target has besides whose towers are cut at their experts."""
    if not plan.room.workspace:
        return []
    place = "in the same place" if plan.room.shared else "beside them, each program having its own"
    handed = f"{place}; {_gb(plan.room.handed)} where programs and experts hand over"
    return [("", f"{'kernels':<14}{_gb(plan.room.workspace):>10}   {handed}")]


def _copies(plan: Plan) -> list[tuple[str, str]]:
    """Weights that lie on the disk twice, where there are any."""
    copies = [f"{target} {_gb(size)}" for target, size in plan.disk.copies.items() if size]
    return [("", f"of these, weights the bundle holds too: {', '.join(copies)}")] if copies else []


def _devices(plan: Plan) -> list[tuple[str, str]]:
    """What lies where, and the cut it takes."""
    if len(plan.devices) == 1:
        return []
    rows = [
        f"{number}: {_gb(d.weights):>8}  {d.holds or 'nothing'}"
        for number, d in enumerate(plan.devices)
    ]
    cut = [f"built with --segments {plan.segments}"] if plan.segments > 1 else []
    return _under("devices", [*rows, *cut])


def _expanded(plan: Plan) -> list[tuple[str, str]]:
    """What a pass moves besides because its experts are not multiplied as they are stored."""
    costs = plan.passes[plan.options.max_batch]
    expanded = (costs.denoising or costs.ar_step).expanded
    if not expanded:
        return []
    half = _gb(expanded / 2)
    return [
        (
            "",
            f"expanded in memory in every pass: {half} written and {half} read besides, slower than {plan.dtype} experts",
        ),
        ("", f"multiplied as they are stored: {FUSED_STACKS}; by kernels, any"),
    ]


def describe_fits(plan: Plan, fits: Sequence[GpuFit]) -> list[str]:
    """The table of GPUs, what would fit those it does not fit, and what the numbers rest on."""
    head = (
        "GPU",
        "fits",
        "weights",
        "state",
        "scratch",
        "total",
        "of",
        "used",
        "pass",
        "AR step",
        "load",
    )
    rows = [head, *(_row(f) for f in fits)]
    lines = [
        "",
        f"GB of 1e9 bytes, on the fullest device; times are lower bounds for {plan.options.max_batch} rows at full length:",
    ]
    lines += aligned(rows, left=(0, 1))
    lines += break_even_lines(plan, fits)
    for why in dict.fromkeys(f.refused for f in fits if f.refused):
        lines += ["", f"{', '.join(f.gpu.title for f in fits if f.refused == why)}: {why}"]
    for f in fits:
        lines += _instead(f)
    lines += [
        "",
        *_left_out(plan, fits),
        *_NOTES,
        *(f"{'':<12}{line}" for line in pass_notes(plan)),
    ]
    if any(f.load for f in fits):
        lines += _load_notes(plan.options.disk_rate)
    if plan.build_peak:
        lines += _BUILD_NOTES
    if any(
        f.gpu.count > 1 or len(f.devices) > 1 or any("--devices" in a.flags for a in f.alternatives)
        for f in fits
    ):
        lines.append(
            "            several devices: one tower each on two, of more runs of layers; never run on GPUs"
        )
    return lines


def _left_out(plan: Plan, fits: Sequence[GpuFit]) -> list[str]:
    if all(f.fits or f.refused for f in fits) or not plan.left_out:
        return []
    return [f"left out    {_why_left_out(plan)}"]


def _why_left_out(plan: Plan) -> str:
    return f"--experts {', '.join(plan.left_out)}: {_EXPANDS[plan.options.target]}, which is slower"


def _load_notes(given: int | None) -> list[str]:
    rate = f"{(given or ASSUMED_DISK_RATE) / 1e9:.3g} GB/s, {'as given' if given else 'an assumption (--disk-rate)'}"
    return [
        f"            load: the slower of the disk at {rate}, and PCIe as published;",
        "            planned, never measured on a GPU",
    ]


def refusal(plan: Plan, fits: Sequence[GpuFit]) -> ConfigError:
    """The error of a plan that fits none of the GPUs it was made for."""
    names = ", ".join(f.gpu.title for f in fits)
    found = "; ".join(f"{f.gpu.title}: {f.refused or _found(f)}" for f in fits)
    possible = [(f, a) for f in fits for a in f.alternatives if a.fits]
    many = len(fits) > 1
    do = "; ".join(f"{f.gpu.title + ': ' if many else ''}{_alternative(a)}" for f, a in possible)
    if not do:
        near = [(a.needs, f, a) for f in fits for a in f.alternatives]
        least = min(near, key=lambda n: n[0], default=None)
        other = " or --target trt or ort-cuda" if any(f.refused for f in fits) else ""
        do = f"plan for another GPU{other}: --gpu all lists them"
        if least:
            do += f"; the least that was tried on {least[1].gpu.title} is {_alternative(least[2])}"
    if plan.left_out:
        do += f"; left out: {_why_left_out(plan)}"
    return ConfigError(
        f"the plan for target {plan.options.target} does not fit {names}", found=found, do=do
    )


def _found(f: GpuFit) -> str:
    n = f.fullest
    parts = f"weights {_gb(n.weights)}, state {_gb(n.state)}, scratch {_gb(n.scratch)}, library {_gb(n.overhead)}"
    return f"needs {_gb(n.total)} ({parts}), has {_gb(f.gpu.memory)}"


def _row(f: GpuFit) -> tuple[str, ...]:
    n = f.fullest
    sizes = (f"{x / 1e9:.1f}" for x in (n.weights, n.state, n.scratch, n.total, f.gpu.memory))
    load = "-" if f.load is None else _time(f.load.seconds)
    verdict = "no (SM)" if f.refused else "yes" if f.fits else "no"
    stars = ["*" if name in f.by_arithmetic else "" for name in ("pass", "step")]
    times = [
        _ms(seconds) + star
        for seconds, star in zip((f.pass_seconds, f.step_seconds), stars, strict=True)
    ]
    return (f.gpu.title, verdict, *sizes, f"{100 * n.total / f.gpu.memory:.0f} %", *times, load)


def _instead(f: GpuFit) -> list[str]:
    if f.fits or f.refused:
        return []
    possible = [a for a in f.alternatives if a.fits]
    if not possible:
        least = min(f.alternatives, key=lambda a: a.needs, default=None)
        return [
            "",
            f"{f.gpu.title}: nothing tried fits"
            + (f"; least: {_alternative(least)}" if least else ""),
        ]
    width = max(len(a.flags) for a in possible)
    return ["", f"{f.gpu.title} would fit with", *(f"  {_alternative(a, width)}" for a in possible)]


def _alternative(a: Alternative, width: int = 0) -> str:
    remarks = [f"made by `twotower quantize --recipe {a.recipe}`"] if a.recipe else []
    remarks += ["the runtime loads both towers so far"] if "--mode ar" in a.flags else []
    later = f" ({'; '.join(remarks)})" if remarks else ""
    return (
        f"{a.flags:<{width}}  {_gb(a.needs)}{later}"
        if width
        else f"`{a.flags}` {_gb(a.needs)}{later}"
    )


def _parameters(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 10**9 else f"{count / 1e6:.3g} million"


def _build(plan: Plan) -> list[tuple[str, str]]:
    """What building takes, and where it can be done."""
    if not plan.build_peak:
        kernels = plan.experts.name == KERNELS
        return [("build", "kernels, which are not counted" if kernels else "nothing is compiled")]
    held = plan.held
    inside = (
        f"{_gb(held)} of weights inside, which TensorRT takes as constants only"
        if held
        else "programs that hold no weights"
    )
    bound = "; --max-build-memory cuts towers" if held and not plan.options.max_build_memory else ""
    return [
        ("build", f"{_files(plan)}, one after the other: {inside}"),
        (
            "",
            f"{_gb(plan.build_peak)} of memory at the peak, {_time(plan.build_seconds or 0.0)} of one processor{bound}",
        ),
        (
            "",
            _WHERE[plan.options.target]
            if not held
            else _WHERE[plan.options.target].replace(", a laptop will do", ""),
        ),
    ]


def _files(plan: Plan) -> str:
    """`3 engines`, or `9 engines for 49 programs`; kernels are compiled besides."""
    programs = sum(e.programs for e in plan.engines)
    said = f"{len(plan.engines)} engines" + (
        f" for {programs} programs" if programs > len(plan.engines) else ""
    )
    return f"{said} and kernels, which are not counted" if plan.experts.name == KERNELS else said


def _kinds(plan: Plan, graph: str) -> str:
    kinds = sorted(plan.weights[graph].by_kind.items(), key=lambda kv: -kv[1])
    return ", ".join(f"{name} {_gb(size)}" for name, size in kinds[:4])


def _gb(size: float) -> str:
    if not size:
        return "none"
    if size >= 1e8:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _small(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.3g} KiB"


def _ms(seconds: float | None) -> str:
    return (
        "-"
        if seconds is None
        else f"{1e3 * seconds:.1f} ms"
        if seconds >= 1e-4
        else f"{1e6 * seconds:.1f} us"
    )


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
