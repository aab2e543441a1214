"""What an engine became, as the library's own inspector tells it: fused layers and their types. It needs a GPU. It has never run."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from twotower.builders.network import BuildLog, make_logger
from twotower.flavour import Flavour
from twotower.hardware import Machine

__all__ = ["inspect_plan", "summarize_layers"]


def inspect_plan(flavour: Flavour, plan: Any, machine: Machine) -> dict[str, Any]:
    """Layers of a serialized engine by type and by type of output, or under `why_not` the reason there are none.

    The report is worth having and not worth an engine: nothing the library says here fails a build.
    """
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
