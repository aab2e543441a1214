"""Which forms of quantized experts TensorRT for RTX multiplies without expanding them.

    python tools/expert_forms.py --output docs/measurements/quantization.md

An expert layer at published widths (2688 x 1856) with 8 of its 128 experts is built in the
denoiser, without a GPU, once for every form; the table is what the compiled programs say. Values
are random, for the choice does not depend on them.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from quantization_tables import replaced

from twotower.builders import builder_for
from twotower.builders.profiles import profiles
from twotower.builders.segment import fix_axes
from twotower.builders.trt.network import BuildLog, NetworkOptions, build_network
from twotower.builders.trt.rtx_program.program import Program
from twotower.builders.trt.rtx_program.read import read_programs
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.calibration.recipes import Recipe, builtin_recipes, quantizable_weights
from twotower.checkpoint.synthetic import published_slice
from twotower.config.formats import FORMATS
from twotower.config.model import ModelConfig, parse_model_config
from twotower.errors import BuildError
from twotower.export.graphs.precision import ActivationFormat, Precision
from twotower.export.graphs.tower_graphs import build_graph
from twotower.spec import DENOISER, signatures
from twotower.weights.declared import Weight

EXPERTS, ROWS, CAPACITY, DTYPE = 8, 8, 512, "bfloat16"
SIZES = {"T": CAPACITY, "S": 16}
NUMPY = {"int4": ml_dtypes.int4, "float4e2m1": ml_dtypes.float4_e2m1fn, "float8e4m3fn": ml_dtypes.float8_e4m3fn, "int8": np.int8,
         "bfloat16": ml_dtypes.bfloat16}  # fmt: skip


def layer_config() -> ModelConfig:
    """The published expert layer with fewer experts and a small vocabulary, and one of attention, which reads the other inputs."""
    return parse_model_config(
        {
            **published_slice("E*"),
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 6,
            "vocab_size": 4096,
        },
        "slice",
    )


def cases() -> list[tuple[str, Recipe]]:
    """Every recipe's experts alone, and forms no recipe uses."""
    found = [("float", Recipe(name="float"))]
    found += [
        (f"`{name}`", recipe.only(["routed_expert"]))
        for name, recipe in builtin_recipes().items()
        if name != "mixed"
    ]
    found = [
        (label.replace("int4-experts`", "int4-experts`, `mixed`"), recipe)
        for label, recipe in found
    ]
    found.append(("own recipe", Recipe(name="int4", weights={"routed_expert": "int4"}, group=64)))
    found.append(("own recipe", Recipe(name="fp8", weights={"routed_expert": "fp8"})))
    return found


def graph_of(config: ModelConfig, recipe: Recipe) -> tuple[onnx.ModelProto, str]:
    """The denoiser as the recipe records it, float weights as inputs; and in words how its experts are stored."""
    plain = build_graph(DENOISER, config, DTYPE)
    parts = {part.name: part for part in quantizable_weights(config, DENOISER)}
    few = {name: how for name, part in parts.items() if (how := recipe.format_of(part))}
    rounded = {
        tap.weight
        for tap in plain.taps
        if tap.weight in few and recipe.quantizes_input_of(parts[tap.weight])
    }
    inputs = {name: ActivationFormat(few[name].dtype, 0.0625) for name in rounded}
    graph = build_graph(DENOISER, config, DTYPE, Precision(few, inputs))
    rng = np.random.default_rng(0)
    for weight in graph.weights:
        value = graph.model.graph.initializers[weight.name]
        if weight.part:
            value.const_value = ir.tensor(
                _numbers(weight, rng), dtype=value.dtype, name=weight.name
            )
        else:
            del graph.model.graph.initializers[weight.name]
            value.const_value = None
            graph.model.graph.inputs.append(value)
    model = ir.to_proto(graph.model)
    fix_axes(model, SIZES)
    how = next(iter(few.values()), None)
    words = (
        "bfloat16" if how is None else how.label if how.group else f"{how.label}, one scale a row"
    )
    return model, words + (", inputs too" if rounded else "")


def _numbers(weight: Weight, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if weight.part == "values":
        return rng.integers(-6, 7, size=weight.shape).astype(np.int8).astype(NUMPY[weight.dtype])
    return np.full(weight.shape, 0.0625, np.float32).astype(NUMPY[weight.dtype])


def built(config: ModelConfig, model: onnx.ModelProto, sm: int) -> Program:
    """The program of a denoiser pass."""
    builder = builder_for("rtx")
    assert isinstance(builder, TensorRTBuilder)
    inputs = signatures(config, DTYPE)[DENOISER].with_sizes(SIZES).inputs
    shapes = profiles(DENOISER, max_batch=ROWS, block_size=SIZES["S"])
    options = NetworkOptions(inputs=inputs, profiles=shapes, sms=(sm,), dtype=DTYPE)
    graph = (model.SerializeToString(), Path("."))
    plan, _ = build_network(builder.variant, graph, options, log=BuildLog(), tick=lambda *_: True)
    (program,) = read_programs(plan, profiles=1)
    return program


def row(label: str, recipe: Recipe) -> str:
    """A line of the table."""
    config = layer_config()
    model, stored = graph_of(config, recipe)
    name = recipe.weights.get("routed_expert")
    sm = max(FORMATS[name].first_sm, 89) if name else 89
    try:
        program = built(config, model, sm)
    except BuildError as e:
        return f"| {label} | {stored} | {sm} | refused: {e.found[:80]} | |"
    copies = [weight.nbytes for weight in program.expanded if weight.stacked]
    whole = EXPERTS * math.prod((config.moe_intermediate_size, config.hidden_size)) * 2
    assert all(size == whole for size in copies), (
        "an expanded copy is all experts of a projection in bfloat16"
    )
    how = (
        f"**expanded**: {sum(copies) / 1e6:.0f} MB written in a pass"
        if copies
        else "in the product"
    )
    return f"| {label} | {stored} | {sm} | {how} | {program.scratch / 1e6:.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="a document that has the table between two comments; without it, only print",
    )
    args = parser.parse_args()
    rows = [
        "| experts of | stored as | SM | a pass multiplies them | scratch |",
        "|---|---|---|---|---|",
    ]
    for label, recipe in cases():
        rows.append(row(label, replace(recipe, name="case")))
        print(rows[-1], flush=True)
    if args.output:
        text = args.output.read_text(encoding="utf-8")
        args.output.write_text(
            replaced(text, "forms", rows, tool="expert_forms.py"), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
