"""Programs as plain data for `build.json`: counts and sums, with what is fused told once a layer kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from twotower.builders.rtx_program.records import Program
from twotower.builders.rtx_program.scopes import kind_of

__all__ = ["summarize_programs"]


def summarize_programs(programs: Sequence[Program]) -> dict[str, Any]:
    """What `inspect` shows of an engine, and a build checks."""
    return {"from": "program text", "programs": [_summary(program) for program in programs]}


def _summary(program: Program) -> dict[str, Any]:
    products = [k for k in program.kernels if k.operation == "runtime_fusion"]
    return {
        "profile": program.profile,
        "sms": list(program.sms),
        "kernels": len(program.kernels),
        "by_kind": _by_kind(program),
        "by_operation": _counts(k.operation for k in program.kernels),
        "by_backbone": _counts(k.backbone or "none" for k in products),
        "streams": program.streams,
        "events": program.events,
        "signals": program.signals,
        "waits": program.waits,
        "capturable": program.capturable,
        "scratch": program.scratch,
        "host": program.host,
        "expanded": [{**asdict(w), "stacked": w.stacked} for w in program.expanded],
        "copied": [asdict(c) for c in program.copied],
        "fused": _fused(program),
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _by_kind(program: Program) -> dict[str, dict[str, int]]:
    """Kernels by layer kind: how many layers, kernels of all, and of the layers with fewest and most."""
    kinds: dict[str, list[int]] = {}
    for scope, count in program.by_scope().items():
        kinds.setdefault(kind_of(scope), []).append(count)
    return {kind: {"layers": len(n), "kernels": sum(n), "min": min(n), "max": max(n)} for kind, n in kinds.items()}


def _fused(program: Program) -> dict[str, list[list[str]]]:
    """For the first layer of every kind, the ONNX nodes each of its kernels carries out."""
    first: dict[str, str] = {}
    for kernel in program.kernels:
        first.setdefault(kind_of(kernel.scope), kernel.scope)
    return {scope: [[k.name, *k.nodes] for k in program.kernels if k.scope == scope] for scope in first.values()}
