"""Towers that are programs with experts between them: what a pass launches of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twotower.bundle import EngineFile, EngineRecord, Profile
from twotower.spec import EXPERTS_IN

__all__ = ["launch_facts", "step_lines"]


def launch_facts(record: EngineRecord) -> dict[str, dict[str, dict[str, Any]]]:
    """Launches of a pass by graph and profile, of graphs that have experts between programs.

    Of each `programs` and `layers` of experts, `kernels` of all programs (None where they were not read), and launches of the
    `experts` for one row and for the most rows.
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
                "" if kernels is None else f"; {kernels + least}" + (f" to {kernels + most}" if most > least else "") + " launches a pass"
            )
            lines.append(
                f"  {graph} {profile}: {told['programs']} programs ({'not read' if kernels is None else f'{kernels} kernels'}) and "
                f"{told['layers']} layers of experts between them ({experts} kernels){total}"
            )
    for graph, steps in record.experts.items():
        programs = record.engines[graph]
        if steps and not programs[0].profiles:
            lines.append(f"  {graph}: {len(programs)} programs and {len(steps)} layers of experts between them")
    lines += [f"  {code}: {_code(about)}" for code, about in record.report.get("experts", {}).items()]
    return lines


def _of_graph(record: EngineRecord, name: str) -> dict[str, dict[str, Any]]:
    programs, experts = record.engines[name], record.experts[name]
    about = record.report.get("experts", {})
    assert record.limits is not None, "engines with experts between have limits"
    out = {}
    for number, profile in enumerate(programs[0].profiles):
        length = _positions(programs[0], profile)
        counts = [sum(_launches(about[step.code]["launches"], rows * length) for step in experts) for rows in (1, record.limits.max_batch)]
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
    return next((int(program["kernels"]) for program in told if program["profile"] == profile), None)


def _code(about: Mapping[str, Any]) -> str:
    sms = ", ".join(map(str, about["sms"]))
    return f"{about['kernels']} kernels for SM {sms}, up to {about['max_tokens']} tokens, by Triton {about['triton']}"
