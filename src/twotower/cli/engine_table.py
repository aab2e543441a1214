"""Built engines as text and data: what each is for and what it took, and the programs compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from twotower.bundle import DATA_SUFFIX, EngineFile, EngineRecord, Profile
from twotower.report.tables import Column, Table
from twotower.spec import EXPERTS_IN
from twotower.units import format_bytes

_SHOWN = 4
_QUANTIZED = {
    "as stored": "quantized weights: products read integers as they are stored, and quantize their "
    "inputs to 8 bits block by block",
    "expanded": "quantized weights: every pass expands them",
}
_EXPERTS_ON_A_CPU = {
    "packed": "experts: the chosen ones compute; packed into memory when the engine is opened",
    "mapped": "experts: the chosen ones compute; read where they lie, as all weights take more "
    "than half of the memory",
}


class EngineReport:
    """The engines of one target: its `build.json`, and whether they fit this machine."""

    def __init__(self, record: EngineRecord, state: str) -> None:
        self._record, self._state = record, state
        self._observed: dict[str, dict[str, Any]] = record.report.get("engines", {})
        # One of each file: equal programs of a tower share one.
        self._files = {
            graph: list({engine.file: engine for engine in engines}.values())
            for graph, engines in record.engines.items()
        }

    def facts(self) -> dict[str, Any]:
        """All of the record as plain data."""
        return {
            "state": self._state,
            "copied_bytes": self._copied_bytes(),
            "launches": launch_facts(self._record),
            **self._record.to_json(),
        }

    def lines(self) -> list[str]:
        """A heading, a table of engines, and what was observed of them.

        Without fixed shapes (ONNX Runtime) there is no table: nothing has profiles or was compiled.
        """
        record = self._record
        for_what = "any number of rows, any length"
        if record.limits is not None:
            limits = record.limits
            sms = ", ".join(map(str, limits.sms))
            on = f"SM {sms}" if sms else "the library's own set of GPUs"
            for_what = f"{on}; up to {limits.max_batch} rows, {limits.capacity} positions"
        size = format_bytes(sum(file.size for file in record.files.values()))
        copies = self._copied_bytes()
        if copies:
            size += f" of which {format_bytes(copies)} weights that the bundle holds too"
        library = f"{record.library.get('name')} {record.library.get('version')}"
        return [
            f"{record.target}: {library}, {record.dtype}, {size}; {for_what}",
            f"  {self._state}",
            *self._table(),
            *self._details(),
            *self._passes(),
            *self._forms(),
            *self._programs(),
        ]

    def _copied_bytes(self) -> int:
        """Bytes of weights the bundle's data files hold too: constants, or widened for a CPU."""
        constants = sum(
            int(facts.get("weights", {}).get("inside_bytes", 0))
            for facts in self._observed.values()
        )
        files = self._record.files.items()
        return constants + sum(file.size for name, file in files if name.endswith(DATA_SUFFIX))

    def _table(self) -> list[str]:
        uses = Counter(e.file for engines in self._record.engines.values() for e in engines)
        table = Table(
            [
                "engine",
                "layers",
                Column("size", format_bytes),
                Column("build", "", " s"),
                Column("memory", format_bytes),
                "source",
                "warnings",
            ]
        )
        compiled = [e for engines in self._files.values() for e in engines if e.profiles]
        for engine in compiled:
            facts = self._observed.get(engine.file, {})
            first, end = engine.layers
            layers = f"{first}-{end - 1}" if end > first else "none"
            file = self._record.files.get(engine.file)
            unexplained = sum(not line.get("explained") for line in facts.get("log", []))
            table.add(
                engine.file,
                layers if uses[engine.file] == 1 else f"{uses[engine.file]} programs",
                file.size if file else "missing",
                facts.get("seconds", "?"),
                facts.get("peak_memory", "?"),
                "cache" if facts.get("cached") else "built",
                f"{unexplained or 'none'} unexplained",
            )
        return table.text("  ") if compiled else []

    def _details(self) -> list[str]:
        """Profiles (those that segments of a graph share once), weights, and layers by type."""
        lines = []
        for graph, engines in self._files.items():
            if not engines[0].profiles:
                continue
            lines.append(f"  {graph}: {'; '.join(map(_profile, engines[0].profiles))}")
            for engine in engines:
                facts = self._observed.get(engine.file, {})
                if "weights" in facts:
                    lines.append(f"    {engine.file}: {_weights(facts['weights'])}")
                if "by_type" in facts:
                    types = ", ".join(_counted(facts["by_type"])[:_SHOWN])
                    results = ", ".join(_counted(facts["by_precision"]))
                    lines.append(
                        f"    {engine.file}: {facts['layers']} layers before fusion "
                        f"({types}, ...); results {results}"
                    )
        return lines

    def _passes(self) -> list[str]:
        """What a pass of every profile launches, where experts run between programs."""
        record = self._record
        lines = []
        for graph, profiles in launch_facts(record).items():
            for profile, facts in profiles.items():
                kernels, (least, most) = facts["kernels"], facts["experts"]
                line = (
                    f"  {graph} {profile}: {facts['programs']} programs "
                    f"({'not read' if kernels is None else f'{kernels} kernels'}) and "
                    f"{facts['layers']} layers of experts between them "
                    f"({_range(least, most)} kernels)"
                )
                if kernels is not None:
                    line += f"; {_range(kernels + least, kernels + most)} launches a pass"
                lines.append(line)
        for graph, steps in record.experts.items():
            programs = record.engines[graph]
            if steps and not programs[0].profiles:
                lines.append(
                    f"  {graph}: {len(programs)} programs and {len(steps)} layers of experts "
                    "between them"
                )
        for code, about in record.report.get("experts", {}).items():
            lines.append(
                f"  {code}: {about['kernels']} kernels for SM {', '.join(map(str, about['sms']))}, "
                f"up to {about['max_tokens']} tokens, by Triton {about['triton']}"
            )
        return lines

    def _forms(self) -> list[str]:
        """What computes experts inside the engines, and the forms an engine of `ort-cpu` has."""
        report = self._record.report
        lines = []
        choice = report.get("choice_of_experts", {})
        if choice.get("computed_by") == "fused":
            count = sum((Counter(each) for each in report["operators"].values()), Counter())
            named = [f"{count[kind]} {kind}" for kind in ("MoE", "QMoE") if count[kind]]
            lines.append(
                f"experts are fused: {' and '.join(named)} of ONNX Runtime compute the chosen ones"
            )
        elif choice.get("why"):
            lines.append(f"experts are dense: {choice['why']}; {choice['cost']}")
        form = report.get("form", {})
        lines += [_EXPERTS_ON_A_CPU.get(form.get("experts"), "")]
        lines += [_QUANTIZED.get(form.get("products"), "")]
        return [f"  {line}" for line in lines if line]

    def _programs(self) -> list[str]:
        """What the engines run, where the build read it: of TensorRT for RTX."""
        engines = [engine for engines in self._files.values() for engine in engines]
        inspected = {e.file: self._observed.get(e.file, {}).get("inspector", {}) for e in engines}
        profiles = {e.file: [p.name for p in e.profiles] for e in engines}
        lines = program_lines(inspected, profiles)
        if self._record.target == "rtx":
            unread = {
                file: told["why_not"] for file, told in inspected.items() if "why_not" in told
            }
            lines += [
                f"  program of {file} not read: {why}" for file, why in sorted(unread.items())
            ]
        return lines


def _profile(profile: Profile) -> str:
    axes = (f"{axis} {_range(low, high)}" for axis, (low, _, high) in profile.axes.items())
    return f"{profile.name} ({', '.join(axes)})"


def _weights(told: Mapping[str, Any]) -> str:
    """How many weights an engine reads, and which kinds it holds and why."""
    read = f"{told['inputs']} weights read as inputs ({format_bytes(told['input_bytes'])})"
    if not told["inside"]:
        return f"{read}; none inside"
    # A reason names the one weight it is about.
    why = Counter(
        "scales of constants" if reason.startswith("a scale of") else reason
        for reason in told["inside"].values()
    )
    held = "; ".join(f"{count}: {reason}" for reason, count in why.most_common())
    return f"{read}; {len(told['inside'])} inside, {format_bytes(told['inside_bytes'])} ({held})"


def _range(least: int, most: int) -> str:
    if least == most:
        return f"{least}"
    return f"{least} to {most}"


def _counted(counts: Mapping[str, int]) -> list[str]:
    return [f"{count} {name}" for name, count in counts.items()]


def launch_facts(record: EngineRecord) -> dict[str, dict[str, dict[str, Any]]]:
    """Launches of a pass by graph and profile, of graphs that have experts between programs.

    Of each `programs` and `layers` of experts, `kernels` of all programs (None if not read), and
    launches of the `experts` for one row and for the most rows.
    """
    about, observed = record.report.get("experts", {}), record.report.get("engines", {})
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for name, experts in record.experts.items():
        if not experts:
            continue
        assert record.limits is not None, "engines with experts between have limits"
        programs = record.engines[name]
        out[name] = {}
        for number, profile in enumerate(programs[0].profiles):
            length = _positions(programs[0], profile)
            launches = []
            for rows in (1, record.limits.max_batch):
                tiers = [about[step.code]["launches"] for step in experts]
                launches.append(
                    sum(next(n for most, n in t if rows * length <= most) for t in tiers)
                )
            kernels = []
            for part in programs:
                told = observed.get(part.file, {}).get("inspector", {}).get("programs", ())
                kernels += [int(p["kernels"]) for p in told if p["profile"] == number]
            out[name][profile.name] = {
                "programs": len(programs),
                "layers": len(experts),
                "kernels": sum(kernels) if len(kernels) == len(programs) else None,
                "experts": launches,
            }
    return out


def _positions(part: EngineFile, profile: Profile) -> int:
    """Tokens of a row, as the profile is tuned for."""
    length = next(spec for spec in part.outputs if spec.name == EXPERTS_IN).axes[1]
    if isinstance(length, str):
        return profile.axes[length][1]
    return length


def program_lines(
    engines: Mapping[str, Mapping[str, Any]], profiles: Mapping[str, Sequence[str]]
) -> list[str]:
    """A table of all programs, and below it what they are made of; empty where none was read.

    By file, `engines` has what `inspect_plan` says, and `profiles` the names of its profiles.
    """
    table = Table(
        [
            "engine",
            "profile",
            *(Column(name, of=name) for name in ("kernels", "streams", "events")),
            Column("scratch", format_bytes, of="scratch"),
            *(Column(name, of=name, left=True) for name in ("capturable", "expanded")),
        ]
    )
    details: list[str] = []
    for file, told in engines.items():
        names = profiles.get(file, ())
        for program in told.get("programs", ()):
            number, expanded = program["profile"], program["expanded"]
            name = names[number] if number < len(names) else str(number)
            size = format_bytes(sum(weight["nbytes"] for weight in expanded))
            told_of = {
                "capturable": {True: "yes", False: "no"}.get(program["capturable"], "unknown"),
                "expanded": f"{len(expanded)} weights, {size} a pass" if expanded else "none",
            }
            table.add_facts({**program, **told_of}, file, name)
            details += [f"  {file} {name}: {line}" for line in _program_details(program)]
    if not details:
        return []
    return [*table.text("  "), *details]


def _program_details(program: Mapping[str, Any]) -> list[str]:
    kinds = []
    for kind, counts in program["by_kind"].items():
        each = f" ({_range(counts['min'], counts['max'])} a layer)" if counts["layers"] > 1 else ""
        kinds.append(f"{kind} {counts['kernels']}{each}")
    lines = [f"kernels {', '.join(kinds)}"]
    expanded = [
        f"{weight['scope']} {'experts' if weight['stacked'] else 'weights'} as {weight['dtype']} "
        f"({format_bytes(weight['nbytes'])})"
        for weight in program["expanded"]
    ]
    if expanded:
        lines.append(f"expanded in memory {_listed(expanded)}")
    for times in sorted({copy["times"] for copy in program["copied"]}):
        sizes = [copy["nbytes"] for copy in program["copied"] if copy["times"] == times]
        how = "transposed" if times == 1 else f"copied {times} times"
        lines.append(
            f"keys and values {how} by {len(sizes)} kernels, {format_bytes(sum(sizes))} a pass"
        )
    return lines


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def fusion_lines(programs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was fused into what, for the first layer of every kind, a kernel a line."""
    lines = []
    for program in programs:
        lines += ["", f"profile {program['profile']}, the first layer of every kind:"]
        for scope, kernels in program["fused"].items():
            lines.append(f"  {scope}")
            for name, *nodes in kernels:
                own = [node.removeprefix(f"{scope}/") for node in nodes]
                lines.append(f"    {name:<40} {_listed(own) if own else 'no node'}")
    return lines
