"""Builds of engines that hold their weights, against the plan (`make engines-inside`).

One expert layer with an attention layer, whose experts are stored as a recipe stores them, random;
built for SM 89 without a GPU in a process of its own, as `twotower build` does. Exit code 1 if a
build takes more memory than planned, or far less.
"""

from __future__ import annotations

import argparse
import math
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from document import write_between

from twotower.builders.build_cost import build_memory, build_seconds
from twotower.builders.profiles import profiles
from twotower.builders.segment import fix_axes, layer_bytes
from twotower.builders.trt.make_engine import run_job
from twotower.builders.weight_inputs import place_weights
from twotower.bundle import DATA_SUFFIX, EngineFile
from twotower.calibration.recipes import builtin_recipes, quantizable_weights
from twotower.checkpoint.synthetic import published_slice
from twotower.config.model import ModelConfig, parse_model_config
from twotower.export.graph_files import save_program
from twotower.export.graphs.precision import ActivationFormat, Precision
from twotower.export.graphs.tower_graphs import build_graph
from twotower.records import encode
from twotower.spec import CONTEXT, DENOISER, signatures
from twotower.weights.declared import lay_out
from twotower.weights.external import load_graph, weight_refs
from twotower.weights.refs import WeightRef

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "measurements" / "engines.md"
MARKS = (
    "<!-- engines-inside: written by `make engines-inside`, begin -->",
    "<!-- engines-inside: end -->",
)
LAYERS, DTYPE, SIZES, ROWS = "E*", "bfloat16", {"T": 4352, "S": 16}, 8
MOST_OFF = 1.3
"""Planned memory over measured. Never under 1: a bound must hold."""

_NUMPY = {
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One build: bytes and seconds, measured and planned."""

    recipe: str
    graph: str
    held: int
    memory: int
    planned_memory: int
    seconds: float
    planned_seconds: float
    nbytes: int


def main(argv: list[str] | None = None, config: dict[str, Any] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "out" / "engines-inside", metavar="FOLDER"
    )
    parser.add_argument(
        "--recipes",
        default="int4-experts,int8",
        metavar="A,B",
        help="recipes of `twotower quantize` (%(default)s)",
    )
    parser.add_argument(
        "--experts",
        type=int,
        default=64,
        help="of a layer; 128 are published, and 0.7 GB in 4 bits (%(default)s)",
    )
    parser.add_argument(
        "--write-docs",
        type=Path,
        nargs="?",
        const=DOCUMENT,
        metavar="FILE",
        help="put the table into docs/measurements/engines.md",
    )
    args = parser.parse_args(argv)
    model = parse_model_config(
        config or {**published_slice(LAYERS), "n_routed_experts": args.experts}, "a slice"
    )
    rows = []
    for recipe in args.recipes.split(","):
        for graph in (CONTEXT, DENOISER):
            print(f"... {recipe}, {graph}", file=sys.stderr, flush=True)
            shutil.rmtree(args.scratch, ignore_errors=True)
            args.scratch.mkdir(parents=True)
            try:
                rows.append(measure(recipe, graph, model, args.scratch))
            finally:
                shutil.rmtree(args.scratch)
    print(table(rows))
    if args.write_docs:
        write_between(args.write_docs, MARKS, table(rows))
    off = [
        f"{r.recipe}, {r.graph}: {r.memory} bytes of memory, planned {r.planned_memory}"
        for r in rows
        if not fits(r)
    ]
    print("\n".join(off), file=sys.stderr)
    return 1 if off else 0


def fits(row: Row) -> bool:
    """Whether what is planned is enough and not far too much."""
    return row.memory <= row.planned_memory <= MOST_OFF * row.memory


def measure(recipe: str, graph: str, config: ModelConfig, folder: Path) -> Row:
    """Builds one engine in a folder.

    Raises:
        BuildError: the library refuses it.
    """
    file = folder / "model.onnx"
    _write_graph(recipe, graph, config, file)
    model = load_graph(file)
    fix_axes(model, SIZES)
    places, signature = (
        place_weights(model, "inputs"),
        signatures(config, DTYPE)[graph].with_sizes(SIZES),
    )
    layers = (0, len(config.layers))
    shapes = profiles(graph, max_batch=ROWS, block_size=SIZES["S"])
    engine = EngineFile(
        "x.engine",
        layers,
        signature.inputs,
        signature.outputs,
        shapes,
        places.inputs,
        tuple(places.inside),
    )
    given = encode(engine)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    job = {
        "target": "rtx",
        "inputs": given["inputs"],
        "profiles": given["profiles"],
        "sms": [89],
        "current": False,
        "dtype": DTYPE,
        "timing_cache": None,
        "graph": str(folder / "graph.onnx"),
        "beside": str(file),
        "output": str(folder / engine.file),
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = run_job(job, folder, tick=lambda *_: None)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    held = layer_bytes(model)
    packed = places.inside_bytes if held.largest_packed else 0
    return Row(
        recipe,
        graph,
        places.inside_bytes,
        facts["peak_memory"],
        build_memory(places.inside_bytes, layers[1], largest_packed=places.largest_packed),
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        build_seconds(graph, layers[1], held=places.inside_bytes, packed=packed),
        facts["bytes"],
    )


def _write_graph(recipe: str, graph: str, config: ModelConfig, file: Path) -> None:
    """A graph as the recipe records it, and random weights beside it: values of any bits, and one scale for all."""
    chosen = builtin_recipes()[recipe].only(["routed_expert"])
    plain = build_graph(graph, config, DTYPE)
    parts = {part.name: part for part in quantizable_weights(config, graph)}
    few = {name: how for name, part in parts.items() if (how := chosen.format_of(part))}
    rounded = {
        tap.weight
        for tap in plain.taps
        if tap.weight in few and chosen.quantizes_input_of(parts[tap.weight])
    }
    inputs = {name: ActivationFormat(few[name].dtype, 0.0625) for name in rounded}
    made = build_graph(graph, config, DTYPE, Precision(few, inputs))
    save_program(file, made, lay_out(made.weights))
    refs = weight_refs(load_graph(file))
    scales = {w.name for w in made.weights if w.part in ("scale", "global_scale")}
    with file.with_name(file.name + DATA_SUFFIX).open("wb") as data:
        data.truncate(max(ref.end for ref in refs.values()))
        for number, (name, ref) in enumerate(refs.items()):
            data.seek(ref.offset)
            if name in scales:
                data.write(
                    np.full(ref.shape, 0.0625, np.float32).astype(_NUMPY[ref.dtype]).tobytes()
                )
            elif name in few or name.removesuffix(".values") in few:
                _write_random(data, ref, number)


def _write_random(data: Any, ref: WeightRef, seed: int) -> None:
    """Bytes that no other weight has: the compiler would keep equal constants once."""
    rng, left = np.random.default_rng(seed), ref.nbytes
    while left:
        left -= data.write(rng.bytes(min(left, 1 << 24)))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| recipe | engine | weights inside | its size | memory of the build | planned | processor time | planned |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{r.recipe}` | {r.graph} | {r.held / 1e9:.2f} GB | {r.nbytes / 1e9:.2f} GB | {r.memory / 1e9:.2f} GB "
        f"| {r.planned_memory / 1e9:.2f} GB | {r.seconds:.0f} s | {math.ceil(r.planned_seconds)} s |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
