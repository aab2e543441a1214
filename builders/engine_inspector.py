"""What an engine became: the program of an RTX plan, or layers as TensorRT's inspector tells them on a GPU (never run)."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from twotower.builders.network import BuildLog, make_logger
from twotower.builders.rtx_program import ProgramTextError, read_programs, summarize_programs
from twotower.hardware import Machine
from twotower.tensorrt_library import Flavour

__all__ = ["inspect_plan", "summarize_layers"]


def inspect_plan(flavour: Flavour, plan: Any, machine: Machine, *, profiles: int | None = None) -> dict[str, Any]:
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
        return {"why_not": f"the engine may not fit this GPU's {machine.gpus[0].memory / 1e9:.1f} GB"}
    log = BuildLog()
    try:
        engine = trt.Runtime(make_logger(trt, log)).deserialize_cuda_engine(plan)
        if engine is None:
            return {"why_not": "; ".join(log.errors()[-2:]) or "the library does not load the engine on this GPU"}
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
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
