"""Refuses engines whose passes expand stacked experts in device memory: they are slower than float ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower.bundle import EngineFile, EngineRecord
from twotower.config.formats import FUSED_STACKS
from twotower.errors import BuildError

__all__ = ["expands_experts", "require_fused"]


def expands_experts(record: EngineRecord) -> bool:
    """Whether a pass of any of the engines writes stacked experts to device memory, as far as their programs were read."""
    return any(_stacks(program) for facts in record.report.get("engines", {}).values() for program in _programs(facts))


def require_fused(engine: EngineFile, facts: Mapping[str, Any], *, readable: bool = False) -> None:
    """Refuses an engine that writes a dequantized copy of stacked experts to device memory in every pass.

    Such a pass reads the experts in few bits, writes them at full width and reads them again: more bytes than
    the float experts have.

    Args:
        engine: The engine.
        facts: What its build observed.
        readable: Whether its program can be read without a GPU. One that holds experts and was not read is then
            refused too: nobody would know. Otherwise it is let through.

    Raises:
        BuildError: it does.
    """
    why_not = facts.get("inspector", {}).get("why_not")
    if readable and why_not and any("experts" in name for name in engine.constants):
        raise BuildError(
            f"nobody can tell whether {engine.file} expands its experts in device memory in every pass",
            found=f"its compiled program was not read: {why_not}",
            do="build with the version of TensorRT for RTX that twotower asks for, or add --allow-expanded",
        )
    programs = [(p, _stacks(p)) for p in _programs(facts)]
    program, stacks = max(programs, key=lambda found: sum(w["nbytes"] for w in found[1]), default=({}, []))
    if not stacks:
        return
    layers, first = len({w["scope"] for w in stacks}), stacks[0]
    size = sum(w["nbytes"] for w in stacks)
    profile = engine.profiles[program["profile"]].name
    more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
    raise BuildError(
        f"{engine.file} expands the experts of {layers} layer(s) in device memory in every pass",
        found=f"profile {profile} writes {size / 1e6:.4g} MB a pass: {first['scope']}, {', '.join(first['weights'])} "
        f"as {first['dtype']} {first['dims']}{more}; that is slower than float experts",
        do="build with --experts kernels, which read them as they are stored; "
        f"or quantize with experts that stay inside their product: {FUSED_STACKS} "
        "(docs/quantization.md); or build it as it is with --allow-expanded",
    )


def _programs(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(facts.get("inspector", {}).get("programs", ()))


def _stacks(program: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [weight for weight in program["expanded"] if weight["stacked"]]
