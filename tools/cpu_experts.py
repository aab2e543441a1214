"""One layer of experts on this CPU: all, the chosen ones, in 4 bits (`make bench-experts`).

Published widths by default, half of the published experts: 5 GB of random weights in a scratch
file. Forms are timed in turns in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir

from twotower.builders.ort.cpu import write_engine
from twotower.builders.ort.engine_weights import cpu_weights, write_engine_data
from twotower.checkpoint.synthetic import published_slice
from twotower.config.formats import stored_format
from twotower.config.model import LayerKind, ModelConfig, parse_model_config
from twotower.export.graph_files import point_to_data
from twotower.export.graphs.layers import moe
from twotower.export.graphs.precision import Precision
from twotower.export.graphs.recorder import GraphBuilder, Layer
from twotower.onnx_runtime import ort, session_options
from twotower.processors import usable_cores
from twotower.spec import CONTEXT, TensorSpec, TowerSignature
from twotower.weights.declared import declared_weights, lay_out
from twotower.weights.external import located_weights
from twotower.weights.refs import WeightRef

PREFIX = "context_tower.layers.0.mixer."
_FEW = "chosen, int4"
MATRICES = tuple(
    f"{PREFIX}{kind}.{name}_proj.weight"
    for kind in ("experts", "shared_experts")
    for name in ("up", "down")
)

Run = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--experts", type=int, default=64, metavar="E", help="experts of the layer (64)"
    )
    parser.add_argument(
        "--tokens", default="1,16,128", metavar="LIST", help="tokens a pass (1,16,128)"
    )
    parser.add_argument(
        "--runs", type=int, default=7, metavar="N", help="measured runs of each form (7)"
    )
    parser.add_argument(
        "--group", type=int, default=64, metavar="N", help="weights of int4 that share a scale (64)"
    )
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="where weights are written (default: the system's temporary folder)",
    )
    args = parser.parse_args(arguments)
    config = parse_model_config(
        {**published_slice("E"), "n_routed_experts": args.experts, "torch_dtype": "float32"},
        "the layer",
    )
    with tempfile.TemporaryDirectory(prefix="twotower-experts-", dir=args.scratch) as scratch:
        folder = Path(scratch)
        int4 = {name: stored_format("int4", 0, stacked=True, group=args.group) for name in MATRICES}
        forms: dict[str, Run] = {
            "every expert, float32": form(folder, config, Precision(), chosen=False),
            "chosen, float32": form(folder, config, Precision(), chosen=True),
        }
        few = {
            even: form(folder, config, Precision(weights=int4), chosen=True, even_rows=even)
            for even in (False, True)
        }
        print(
            f"{args.experts} experts of {config.moe_intermediate_size} x {config.hidden_size}, int4 in groups of {args.group}, "
            f"{usable_cores()} cores, milliseconds"
        )
        print(f"{'tokens':>7}" + "".join(f"{name:>24}" for name in (*forms, _FEW)))
        for count in map(int, args.tokens.split(",")):
            forms[_FEW] = few[
                count % 2 == 0
            ]  # as in a context tower that decodes, and in a denoiser
            x = np.random.default_rng(count).standard_normal(
                (1, count, config.hidden_size), dtype=np.float32
            )
            spent = {
                name: median(column)
                for name, column in zip(
                    forms, zip(*timed(forms, x, args.runs), strict=True), strict=True
                )
            }
            print(
                f"{count:>7}" + "".join(f"{1000 * seconds:>24.2f}" for seconds in spent.values()),
                flush=True,
            )
    return 0


def timed(forms: dict[str, Run], x: np.ndarray[Any, Any], runs: int) -> list[list[float]]:
    """Seconds of every form in each run, after one that is not counted."""
    out = []
    for _ in range(runs + 1):
        row = []
        for run in forms.values():
            started = time.perf_counter()
            run(x)
            row.append(time.perf_counter() - started)
        out.append(row)
    return out[1:]


def form(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    *,
    chosen: bool,
    even_rows: bool = False,
) -> Run:
    """An engine of the layer alone, on random weights.

    Args:
        folder: Where it is written.
        config: The layer's sizes.
        precision: What is stored in few bits.
        chosen: Compute only the chosen experts.
        even_rows: Whether passes always have an even number of tokens, as a denoiser's.
    """
    axes = ("B", "L", config.hidden_size)
    x, y = TensorSpec("x", "float32", axes), TensorSpec("y", "float32", axes)
    declared = declared_weights(config, CONTEXT, "float32", precision.weights)
    signature = TowerSignature("moe", (x,), (y,))
    graph = GraphBuilder(signature, "float32", declared, precision.activations)
    prefix = f"context_tower.layers.{config.indices(LayerKind.MOE)[0]}.mixer."
    with graph.scope("layer.moe"):
        graph.output("y", moe(Layer(graph, config, prefix), graph.input("x")))
    recorded, refs = graph.finish(), lay_out(graph.weights)
    kind = f"{'chosen' if chosen else 'all'}{len(precision.weights)}{'even' if even_rows else ''}"
    write_random(folder / f"{len(precision.weights)}.data", refs)
    point_to_data(recorded, refs, f"{len(precision.weights)}.data")
    model = ir.to_proto(recorded)
    weights = cpu_weights(model, as_stored=chosen, even_rows=even_rows)
    located = dict(located_weights(model))
    own, _ = write_engine_data(
        folder / f"{len(precision.weights)}.data", folder / f"{kind}.own", weights
    )
    located |= {name: (f"{kind}.own", ref) for name, ref in own.items()}
    write_engine(
        model,
        located,
        folder / f"{kind}.onnx",
        name="moe",
        top=config.num_experts_per_tok if chosen else None,
    )
    options = session_options(folder, threads=usable_cores())
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        (folder / f"{kind}.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: np.asarray(session.run(None, {"x": x})[0])


def write_random(path: Path, refs: dict[str, WeightRef]) -> None:
    """Numbers of a size that keeps results finite; the same ones again for the same layout."""
    if path.exists():
        return
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for ref in sorted(refs.values(), key=lambda ref: ref.offset):
            file.seek(ref.offset)
            for first in range(0, ref.nbytes, 1 << 26):
                size = min(1 << 26, ref.nbytes - first)
                if ref.dtype == "float32":
                    (random.standard_normal(size // 4, dtype=np.float32) / 64).tofile(file)
                else:
                    random.integers(0, 256, size, dtype=np.uint8).tofile(file)


if __name__ == "__main__":
    sys.exit(main())
