"""What an engine became: programs of TensorRT for RTX, or layers by TensorRT's inspector.

The latter needs a GPU and has never run. Engines whose passes expand stacked experts in device
memory are refused: they are slower than float ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from twotower.builders.trt.network import BuildLog, make_logger
from twotower.builders.trt.rtx_program.analysis import summarize_programs
from twotower.builders.trt.rtx_program.read import read_programs
from twotower.builders.trt.rtx_program.text import ProgramTextError
from twotower.bundle import EngineFile, EngineRecord
from twotower.config.formats import FUSED_STACKS
from twotower.errors import BuildError
from twotower.hardware import Machine
from twotower.tensorrt_library import Variant
from twotower.units import format_bytes


def inspect_plan(
    variant: Variant, plan: Any, machine: Machine, *, profiles: int | None = None
) -> dict[str, Any]:
    """What a serialized engine runs, or under `why_not` the reason that is not known.

    Of TensorRT for RTX it is kernels, memory and fusions of every profile (`summarize_programs`);
    of TensorRT it is layers by type and by type of output, which needs a GPU.

    The report is worth having and not worth an engine: nothing that is found here fails a build.
    """
    if variant.target == "rtx":
        try:
            return summarize_programs(read_programs(plan, profiles=profiles))
        except ProgramTextError as e:
            return {"why_not": f"{e.what}: {e.found}"}
    trt = variant.module
    if not machine.gpus:
        return {"why_not": "no GPU: the inspector reads an engine that was loaded on one"}
    if machine.gpus[0].memory < 2 * plan.nbytes:
        memory = format_bytes(machine.gpus[0].memory)
        return {"why_not": f"the engine may not fit this GPU's {memory}"}
    log = BuildLog()
    try:
        engine = trt.Runtime(make_logger(trt, log)).deserialize_cuda_engine(plan)
        if engine is None:
            unknown = "the library does not load the engine on this GPU"
            return {"why_not": "; ".join(log.errors()[-2:]) or unknown}
        inspector = engine.create_engine_inspector()
        told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return summarize_layers(json.loads(told))
    except (AttributeError, RuntimeError, MemoryError, TypeError, ValueError) as e:
        return {"why_not": f"{type(e).__name__}: {e}"}


def summarize_layers(told: dict[str, Any]) -> dict[str, Any]:
    """The inspector's JSON as counts; a layer is a mere name without detailed profiling."""
    types: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for layer in told.get("Layers", []):
        if isinstance(layer, dict):
            types[str(layer.get("LayerType", "unknown"))] += 1
            first = (layer.get("Outputs") or [{}])[0]
            output = first if isinstance(first, dict) else {}
            precisions[output.get("Datatype") or output.get("Format/Datatype") or "none"] += 1
    return {
        "layers": len(told.get("Layers", [])),
        "by_type": dict(types.most_common()),
        "by_precision": dict(precisions.most_common()),
    }


def expands_experts(record: EngineRecord) -> bool:
    """Whether any engine's program, where it was read, writes stacked experts to device memory."""
    return any(_stacks(facts) for facts in record.report.get("engines", {}).values())


def require_fused(engine: EngineFile, facts: Mapping[str, Any], *, readable: bool = False) -> None:
    """Refuses, by BuildError, an engine that expands stacked experts in device memory.

    Every pass would read the quantized experts, write them at full width and read them again: more
    bytes than float experts have. If the program is `readable` without a GPU, an engine with
    experts that was not read is refused too; otherwise it is let through.
    """
    why_not = facts.get("inspector", {}).get("why_not")
    if readable and why_not and any("experts" in name for name in engine.constants):
        raise BuildError(
            f"nobody can tell whether {engine.file} expands its experts in device memory "
            "in every pass",
            found=f"its compiled program was not read: {why_not}",
            do="build with the version of TensorRT for RTX that twotower asks for, "
            "or add --allow-expanded",
        )
    found = _stacks(facts)
    if not found:
        return
    number, stacks = max(found.items(), key=lambda item: sum(w["nbytes"] for w in item[1]))
    layers, first = len({w["scope"] for w in stacks}), stacks[0]
    size = format_bytes(sum(w["nbytes"] for w in stacks))
    more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
    raise BuildError(
        f"{engine.file} expands the experts of {layers} layer(s) in device memory in every pass",
        found=f"profile {engine.profiles[number].name} writes {size} a pass: {first['scope']}, "
        f"{', '.join(first['weights'])} as {first['dtype']} {first['dims']}{more}; "
        "that is slower than float experts",
        do="build with --experts kernels, which read them as they are stored; "
        f"or quantize with experts that stay inside their product: {FUSED_STACKS} "
        "(docs/quantization.md); or build it as it is with --allow-expanded",
    )


def _stacks(facts: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """By profile, the stacked experts that its passes write to device memory."""
    programs = facts.get("inspector", {}).get("programs", ())
    stacks = {p["profile"]: [w for w in p["expanded"] if w["stacked"]] for p in programs}
    return {profile: found for profile, found in stacks.items() if found}
