"""What an engine became: the program of an RTX plan, or layers as TensorRT's inspector tells them on a GPU (never run).

Engines whose passes expand stacked experts in device memory are refused: they are slower than float
ones.
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
from twotower.tensorrt_library import Flavour

__all__ = ["expands_experts", "inspect_plan", "require_fused", "summarize_layers"]


def inspect_plan(
    flavour: Flavour, plan: Any, machine: Machine, *, profiles: int | None = None
) -> dict[str, Any]:
    """What a serialized engine runs, or under `why_not` the reason that is not known.

    Of TensorRT for RTX it is kernels, memory and fusions of every profile (`summarize_programs`);
    of TensorRT it is layers by type and by type of output, which needs a GPU.

    The report is worth having and not worth an engine: nothing that is found here fails a build.

    Args:
        flavour: The library.
        plan: Its buffer with the engine.
        machine: With its GPUs.
        profiles: How many optimization profiles the engine was built with.
    """
    if flavour.target == "rtx":
        try:
            return summarize_programs(read_programs(plan, profiles=profiles))
        except ProgramTextError as e:
            return {"why_not": f"{e.what}: {e.found}"}
    return _loaded(flavour, plan, machine)


def _loaded(flavour: Flavour, plan: Any, machine: Machine) -> dict[str, Any]:
    """Layers of an engine that is loaded on the GPU at hand."""
    trt = flavour.module
    if not machine.gpus:
        return {"why_not": "no GPU: the inspector reads an engine that was loaded on one"}
    if machine.gpus[0].memory < 2 * plan.nbytes:
        return {
            "why_not": f"the engine may not fit this GPU's {machine.gpus[0].memory / 1e9:.1f} GB"
        }
    log = BuildLog()
    try:
        engine = trt.Runtime(make_logger(trt, log)).deserialize_cuda_engine(plan)
        if engine is None:
            return {
                "why_not": "; ".join(log.errors()[-2:])
                or "the library does not load the engine on this GPU"
            }
        text = engine.create_engine_inspector().get_engine_information(
            trt.LayerInformationFormat.JSON
        )
        return summarize_layers(json.loads(text))
    except (AttributeError, RuntimeError, MemoryError, TypeError, ValueError) as e:
        return {"why_not": f"{type(e).__name__}: {e}"}


def summarize_layers(told: dict[str, Any]) -> dict[str, Any]:
    """The inspector's JSON as counts. A layer is a name alone where the engine was not built with detailed profiling."""
    layers = [layer for layer in told.get("Layers", []) if isinstance(layer, dict)]
    types = Counter(str(layer.get("LayerType", "unknown")) for layer in layers)
    return {
        "layers": len(told.get("Layers", [])),
        "by_type": dict(types.most_common()),
        "by_precision": dict(Counter(_output_type(layer) for layer in layers).most_common()),
    }


def _output_type(layer: dict[str, Any]) -> str:
    outputs = layer.get("Outputs") or [{}]
    first = outputs[0] if isinstance(outputs[0], dict) else {}
    return str(first.get("Datatype") or first.get("Format/Datatype") or "none")


def expands_experts(record: EngineRecord) -> bool:
    """Whether a pass of any of the engines writes stacked experts to device memory, as far as their programs were read."""
    return any(
        _stacks(program)
        for facts in record.report.get("engines", {}).values()
        for program in _programs(facts)
    )


def require_fused(engine: EngineFile, facts: Mapping[str, Any], *, readable: bool = False) -> None:
    """Refuses an engine that writes a dequantized copy of stacked experts to device memory in every pass.

    Such a pass reads the experts in few bits, writes them at full width and reads them again: more
    bytes than the float experts have.

    Args:
        engine: The engine.
        facts: What its build observed.
        readable: Whether its program can be read without a GPU. One that holds experts and was not
            read is then refused too: nobody would know. Otherwise it is let through.

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
    program, stacks = max(
        programs, key=lambda found: sum(w["nbytes"] for w in found[1]), default=({}, [])
    )
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
