"""Compiled programs as text: a line a program, its kernels by layer kind, and what is copied in vain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twotower.cli.progress import human_bytes

__all__ = ["fusion_lines", "program_lines"]

_HEAD = ("engine", "profile", "kernels", "streams", "events", "scratch", "capturable", "expanded")
_SHOWN = 4


def program_lines(
    engines: Mapping[str, Mapping[str, Any]], profiles: Mapping[str, Sequence[str]]
) -> list[str]:
    """A table of all programs, and below it what they are made of; empty where none was read.

    Args:
        engines: By file what `inspect_plan` says of it.
        profiles: By file the names of its profiles.
    """
    read = {file: told["programs"] for file, told in engines.items() if told.get("programs")}
    if not read:
        return []
    rows: list[tuple[str, ...]] = [_HEAD]
    details: list[str] = []
    for file, programs in read.items():
        names = profiles.get(file, ())
        for program in programs:
            number = program["profile"]
            name = names[number] if number < len(names) else str(number)
            rows.append(_row(file, name, program))
            details += [f"  {file} {name}: {line}" for line in _details(program)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
    ]
    return [*table, *details]


def _row(file: str, name: str, program: Mapping[str, Any]) -> tuple[str, ...]:
    capturable = {True: "yes", False: "no"}.get(program["capturable"], "not told")
    expanded = program["expanded"]
    size = human_bytes(sum(w["nbytes"] for w in expanded))
    return (
        file,
        name,
        str(program["kernels"]),
        str(program["streams"]),
        str(program["events"]),
        human_bytes(program["scratch"]),
        capturable,
        f"{len(expanded)} weights, {size} a pass" if expanded else "none",
    )


def _details(program: Mapping[str, Any]) -> list[str]:
    lines = ["kernels " + ", ".join(_kind(k, v) for k, v in program["by_kind"].items())]
    if program["expanded"]:
        lines.append("expanded in memory " + _listed([_copy(w) for w in program["expanded"]]))
    for times in sorted({c["times"] for c in program["copied"]}):
        sizes = [c["nbytes"] for c in program["copied"] if c["times"] == times]
        how = "transposed" if times == 1 else f"copied {times} times"
        lines.append(
            f"keys and values {how} by {len(sizes)} kernels, {human_bytes(sum(sizes))} a pass"
        )
    return lines


def _kind(kind: str, counts: Mapping[str, int]) -> str:
    each = (
        f"{counts['min']}"
        if counts["min"] == counts["max"]
        else f"{counts['min']} to {counts['max']}"
    )
    return f"{kind} {counts['kernels']}" + (f" ({each} a layer)" if counts["layers"] > 1 else "")


def _copy(weight: Mapping[str, Any]) -> str:
    what = "experts" if weight["stacked"] else "weights"
    return f"{weight['scope']} {what} as {weight['dtype']} ({human_bytes(weight['nbytes'])})"


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
