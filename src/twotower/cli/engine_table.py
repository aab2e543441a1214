"""Built engines as tables: what each was built for, of what, at what cost, and the steps of a tower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from twotower.bundle import DATA_SUFFIX, EngineFile, EngineRecord, Profile
from twotower.cli.program_table import program_lines
from twotower.cli.progress import human_bytes
from twotower.spec import EXPERTS_IN

__all__ = ["copied_bytes", "engine_facts", "engine_lines", "launch_facts", "step_lines"]

_TYPES_SHOWN = 4


def engine_facts(record: EngineRecord, state: str) -> dict[str, Any]:
    """All of a record as plain data, with whether it fits here."""
    return {
        "state": state,
        "copied_bytes": copied_bytes(record),
        "launches": launch_facts(record),
        **record.to_json(),
    }


def copied_bytes(record: EngineRecord) -> int:
    """Bytes of a target's engines that are weights, which the bundle's data files hold too: constants, or widened for a CPU."""
    engines = record.report.get("engines", {}).values()
    constants = sum(int(facts.get("weights", {}).get("inside_bytes", 0)) for facts in engines)
    return constants + sum(
        file.size for name, file in record.files.items() if name.endswith(DATA_SUFFIX)
    )


def engine_lines(record: EngineRecord, state: str) -> list[str]:
    """A heading, and for every engine two lines; a target without fixed shapes has the heading alone."""
    limits = record.limits
    size = human_bytes(sum(file.size for file in record.files.values()))
    for_what = "any number of rows, any length"
    if limits is not None:
        sms = (
            f"SM {', '.join(map(str, limits.sms))}"
            if limits.sms
            else "the library's own set of GPUs"
        )
        for_what = f"{sms}; up to {limits.max_batch} rows, {limits.capacity} positions"
    copies = copied_bytes(record)
    size += f" of which {human_bytes(copies)} weights that the bundle holds too" if copies else ""
    head = f"{record.target}: {record.library.get('name')} {record.library.get('version')}, {record.dtype}, {size}; {for_what}"
    observed = record.report.get("engines", {})
    rows: list[tuple[str, ...]] = [
        ("engine", "layers", "size", "build", "memory", "source", "warnings")
    ]
    uses = Counter(engine.file for parts in record.engines.values() for engine in parts)
    # A program of ONNX Runtime is a graph: there are no profiles, and nothing was compiled that
    # could be told.
    every = [
        engine
        for parts in record.engines.values()
        for engine in _distinct(parts)
        if engine.profiles
    ]
    rows += [
        _row(engine, record, observed.get(engine.file, {}), uses[engine.file]) for engine in every
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [f"  {state}", *(_aligned(row, widths) for row in rows)]
        if len(rows) > 1
        else [f"  {state}"]
    )
    details = (
        *_details(record, observed),
        *step_lines(record),
        *_experts(record),
        *_on_a_cpu(record),
    )
    return [head, *lines, *details, *_programs(record, observed)]


def _experts(record: EngineRecord) -> list[str]:
    """What computes experts inside the engines: one operator a layer, or all of them, why, and what that costs."""
    choice = record.report.get("choice_of_experts", {})
    if choice.get("computed_by") == "fused":
        counts = [Counter(operators) for operators in record.report["operators"].values()]
        named = [
            f"{count} {kind}" for kind in ("MoE", "QMoE") if (count := sum(c[kind] for c in counts))
        ]
        return [
            f"  experts are fused: {' and '.join(named)} of ONNX Runtime compute the chosen ones"
        ]
    return [f"  experts are dense: {choice['why']}; {choice['cost']}"] if choice.get("why") else []


_FEW_BITS = {
    "as stored": "few bits: products read integers as they are stored, and round their inputs to 8 bits block by block",
    "expanded": "few bits: every pass expands them",
}
_EXPERTS_ON_A_CPU = {
    "packed": "experts: the chosen ones compute; packed into memory when the engine is opened",
    "mapped": "experts: the chosen ones compute; read where they lie, as all weights take more than half of the memory",
}


def _on_a_cpu(record: EngineRecord) -> list[str]:
    """The forms an engine of `ort-cpu` was built in."""
    form = record.report.get("form", {})
    told = (_EXPERTS_ON_A_CPU.get(form.get("experts")), _FEW_BITS.get(form.get("products")))
    return [f"  {line}" for line in told if line]


def _distinct(parts: Sequence[EngineFile]) -> list[EngineFile]:
    """One of each file: equal programs of a tower share one."""
    out: dict[str, EngineFile] = {}
    for engine in parts:
        out.setdefault(engine.file, engine)
    return list(out.values())


def _programs(record: EngineRecord, observed: dict[str, Any]) -> list[str]:
    """What the engines run, where the build read it: of TensorRT for RTX."""
    engines = [engine for parts in record.engines.values() for engine in _distinct(parts)]
    inspected = {e.file: observed.get(e.file, {}).get("inspector", {}) for e in engines}
    profiles = {e.file: [p.name for p in e.profiles] for e in engines}
    unread = {
        f"  program of {file} not read: {told['why_not']}"
        for file, told in inspected.items()
        if record.target == "rtx" and "why_not" in told
    }
    return [*program_lines(inspected, profiles), *sorted(unread)]


def _row(
    engine: EngineFile, record: EngineRecord, facts: dict[str, Any], uses: int
) -> tuple[str, ...]:
    first, end = engine.layers
    layers = f"{first}-{end - 1}" if end > first else "none"
    unexplained = sum(not line.get("explained") for line in facts.get("log", []))
    return (
        engine.file,
        layers if uses == 1 else f"{uses} programs",
        human_bytes(record.files[engine.file].size) if engine.file in record.files else "missing",
        f"{facts['seconds']} s" if "seconds" in facts else "?",
        human_bytes(facts["peak_memory"]) if "peak_memory" in facts else "?",
        "cache" if facts.get("cached") else "built",
        f"{unexplained} unexplained" if unexplained else "none unexplained",
    )


def _details(record: EngineRecord, observed: dict[str, Any]) -> list[str]:
    """Profiles and layers by type. Segments of a graph have the same profiles: these are told once."""
    lines = []
    for graph, parts in record.engines.items():
        if not parts[0].profiles:
            continue
        lines.append(f"  {graph}: {'; '.join(map(_profile, parts[0].profiles))}")
        for engine in _distinct(parts):
            facts = observed.get(engine.file, {})
            lines += _weights(engine, facts.get("weights"))
            if "by_type" in facts:
                top = ", ".join(
                    f"{count} {kind}"
                    for kind, count in list(facts["by_type"].items())[:_TYPES_SHOWN]
                )
                kinds = ", ".join(
                    f"{count} {kind}" for kind, count in facts["by_precision"].items()
                )
                lines.append(
                    f"    {engine.file}: {facts['layers']} layers before fusion ({top}, ...); results {kinds}"
                )
    return lines


def _weights(engine: EngineFile, told: dict[str, Any] | None) -> list[str]:
    """How many weights an engine reads, and which kinds it holds and why."""
    if told is None:
        return []
    read = f"{told['inputs']} weights read as inputs ({human_bytes(told['input_bytes'])})"
    why = Counter(_kind(reason) for reason in told["inside"].values())
    if not told["inside"]:
        return [f"    {engine.file}: {read}; none inside"]
    held = "; ".join(f"{count}: {reason}" for reason, count in why.most_common())
    return [
        f"    {engine.file}: {read}; {len(told['inside'])} inside, {human_bytes(told['inside_bytes'])} ({held})"
    ]


def _kind(reason: str) -> str:
    """A reason without the name of the one weight it is about."""
    return "scales of constants" if reason.startswith("a scale of") else reason


def _profile(profile: Profile) -> str:
    axes = ", ".join(
        f"{axis} {low}" if low == high else f"{axis} {low} to {high}"
        for axis, (low, _, high) in profile.axes.items()
    )
    return f"{profile.name} ({axes})"


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    return (
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    )


def launch_facts(record: EngineRecord) -> dict[str, dict[str, dict[str, Any]]]:
    """Launches of a pass by graph and profile, of graphs that have experts between programs.

    Of each `programs` and `layers` of experts, `kernels` of all programs (None where they were not
    read), and launches of the `experts` for one row and for the most rows.
    """
    return {name: _of_graph(record, name) for name, steps in record.experts.items() if steps}


def step_lines(record: EngineRecord) -> list[str]:
    """The same as text, a line a pass."""
    lines = []
    for graph, passes in launch_facts(record).items():
        for profile, told in passes.items():
            least, most = told["experts"]
            experts = f"{least}" if least == most else f"{least} to {most}"
            kernels = told["kernels"]
            total = (
                ""
                if kernels is None
                else f"; {kernels + least}"
                + (f" to {kernels + most}" if most > least else "")
                + " launches a pass"
            )
            lines.append(
                f"  {graph} {profile}: {told['programs']} programs ({'not read' if kernels is None else f'{kernels} kernels'}) and "
                f"{told['layers']} layers of experts between them ({experts} kernels){total}"
            )
    for graph, steps in record.experts.items():
        programs = record.engines[graph]
        if steps and not programs[0].profiles:
            lines.append(
                f"  {graph}: {len(programs)} programs and {len(steps)} layers of experts between them"
            )
    lines += [
        f"  {code}: {_code(about)}" for code, about in record.report.get("experts", {}).items()
    ]
    return lines


def _of_graph(record: EngineRecord, name: str) -> dict[str, dict[str, Any]]:
    programs, experts = record.engines[name], record.experts[name]
    about = record.report.get("experts", {})
    assert record.limits is not None, "engines with experts between have limits"
    out = {}
    for number, profile in enumerate(programs[0].profiles):
        length = _positions(programs[0], profile)
        counts = [
            sum(_launches(about[step.code]["launches"], rows * length) for step in experts)
            for rows in (1, record.limits.max_batch)
        ]
        kernels = [_kernels(record, part.file, number) for part in programs]
        out[profile.name] = {
            "programs": len(programs),
            "layers": len(experts),
            "kernels": None if None in kernels else sum(k for k in kernels if k is not None),
            "experts": counts,
        }
    return out


def _positions(part: EngineFile, profile: Profile) -> int:
    """Tokens of a row, as the profile is tuned for."""
    length = next(spec for spec in part.outputs if spec.name == EXPERTS_IN).axes[1]
    return profile.axes[length][1] if isinstance(length, str) else length


def _launches(tiers: Sequence[Sequence[int]], tokens: int) -> int:
    return next(count for most, count in tiers if tokens <= most)


def _kernels(record: EngineRecord, file: str, profile: int) -> int | None:
    told = record.report.get("engines", {}).get(file, {}).get("inspector", {}).get("programs", ())
    return next(
        (int(program["kernels"]) for program in told if program["profile"] == profile), None
    )


def _code(about: Mapping[str, Any]) -> str:
    sms = ", ".join(map(str, about["sms"]))
    return f"{about['kernels']} kernels for SM {sms}, up to {about['max_tokens']} tokens, by Triton {about['triton']}"
