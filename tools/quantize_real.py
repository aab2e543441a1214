"""One expert layer at published widths, quantized: seconds, memory, bytes and error.

Every format is made in a process of its own, by the code `twotower quantize` runs, from a data file
as an export writes it. Nothing of the layer but its routed experts is quantized or computed; 16
tokens of a block are routed to 6 experts each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from twotower.bench.speed import run_measured
from twotower.calibration.quantized_data import FloatWeights, stream_quantized
from twotower.calibration.recipes import Recipe, quantizable_weights
from twotower.calibration.weight_quantization import expand_rows
from twotower.checkpoint.synthetic import published_slice
from twotower.config.model import ModelConfig, parse_model_config
from twotower.export.graphs.precision import Precision
from twotower.export.graphs.tower_graphs import build_graph
from twotower.spec import CONTEXT
from twotower.weights.declared import Weight, lay_out
from twotower.weights.mapped import read_weight
from twotower.weights.refs import WeightRef

CASES = (("int8", 32, "plain"), ("int8", 32, "mse"), ("int4", 32, "plain"), ("int4", 32, "mse"), ("int4", 64, "mse"),
         ("nvfp4", 16, "plain"), ("nvfp4", 16, "mse"), ("fp8", 0, "plain"))  # fmt: skip
DTYPE, TOKENS = "bfloat16", 16


def layer_config(experts: int) -> ModelConfig:
    """The published layer, with fewer experts for a trial."""
    return parse_model_config(
        {
            **published_slice("E*"),
            "n_routed_experts": experts,
            "num_experts_per_tok": min(6, experts),
        },
        "slice",
    )


def weights_of(config: ModelConfig, recipe: Recipe | None) -> list[Weight]:
    """What the graph declares for the layer's routed experts."""
    parts = [part for part in quantizable_weights(config, CONTEXT) if part.kind == "routed_expert"]
    few = {part.name: how for part in parts if recipe and (how := recipe.format_of(part))}
    names = {part.name for part in parts}
    return [
        w
        for w in build_graph(CONTEXT, config, DTYPE, Precision(few)).weights
        if (w.origin or w.name) in names
    ]


def recipe_of(name: str, group: int) -> Recipe:
    """The format for the experts alone."""
    return Recipe(name=name, weights={"routed_expert": name}, group=group if name == "int4" else 32)


def write_float(path: Path, config: ModelConfig) -> dict[str, WeightRef]:
    """Random experts with a few outliers, as trained ones have them: one weight in 10000 is ten times as large."""
    refs = lay_out(weights_of(config, None))
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for ref in refs.values():
            file.seek(ref.offset)
            for _ in range(ref.shape[0]):
                block = rng.standard_normal(ref.shape[1:], dtype=np.float32) / np.float32(
                    np.sqrt(ref.shape[-1])
                )
                block.reshape(-1)[rng.integers(0, block.size, block.size // 10_000)] *= 10
                (block.view(np.uint32) >> 16).astype(np.uint16).tofile(file)
    return refs


def quantize(source: str, target: str, experts: int, name: str, group: int, rounding: str) -> None:
    """The measured work."""
    config = layer_config(experts)
    refs = lay_out(weights_of(config, None))
    stream_quantized(
        Path(target),
        weights_of(config, recipe_of(name, group)),
        FloatWeights(Path(source), refs, DTYPE),
        rounding=rounding,
    )


def output_of(config: ModelConfig, read: Any) -> np.ndarray[Any, Any]:
    """The routed experts' part of the layer for a block of tokens; `read(name, expert)` gives a matrix."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((TOKENS, config.hidden_size), dtype=np.float32)
    up, down = (w.origin or w.name for w in weights_of(config, None))
    chosen = np.stack(
        [
            rng.permutation(config.n_routed_experts)[: config.num_experts_per_tok]
            for _ in range(TOKENS)
        ]
    )
    share = rng.dirichlet(np.ones(config.num_experts_per_tok), TOKENS).astype(
        np.float32
    ) * np.float32(config.routed_scaling_factor)
    out = np.zeros_like(x)
    for expert in np.unique(chosen):
        rows, slots = np.nonzero(chosen == expert)
        hidden = np.square(np.maximum(x[rows] @ read(up, expert).T, 0))
        out[rows] += share[rows, slots][:, None] * (hidden @ read(down, expert).T)
    return out


def float_reader(path: Path, refs: dict[str, WeightRef]) -> Any:
    data = np.memmap(path, dtype=np.uint8, mode="r")

    def read(name: str, expert: int) -> np.ndarray[Any, Any]:
        ref = refs[name]
        return read_weight(
            data,
            WeightRef(ref.dtype, ref.shape[1:], ref.offset + expert * (ref.nbytes // ref.shape[0])),
        )

    return read


def few_bits_reader(path: Path, weights: list[Weight]) -> Any:
    data, refs = np.memmap(path, dtype=np.uint8, mode="r"), lay_out(weights)

    def one(ref: WeightRef, expert: int) -> np.ndarray[Any, Any]:
        return read_weight(
            data,
            WeightRef(ref.dtype, ref.shape[1:], ref.offset + expert * (ref.nbytes // ref.shape[0])),
        )

    def read(name: str, expert: int) -> np.ndarray[Any, Any]:
        shared = (
            read_weight(data, refs[f"{name}.global_scale"])
            if f"{name}.global_scale" in refs
            else None
        )
        return expand_rows(one(refs[name], expert), one(refs[f"{name}.scale"], expert), shared)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", default=".", help="a disk with room for 4 GB")
    parser.add_argument("--experts", type=int, default=128, help="fewer for a trial (%(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        help="a document whose table is exchanged, docs/measurements/quantization.md for instance",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_args()
    config = layer_config(args.experts)
    rows = [
        "| format | rounding | seconds | peak anonymous memory | bits a weight | relative error of the output |",
        "|---|---|---|---|---|---|",
    ]
    if not args.json:
        print("\n".join(rows))
    with tempfile.TemporaryDirectory(prefix="quantize-real-", dir=args.scratch) as scratch:
        source, target = Path(scratch) / "float", Path(scratch) / "few"
        refs = write_float(source, config)
        exact = output_of(config, float_reader(source, refs))
        count = sum(int(np.prod(ref.shape)) for ref in refs.values())
        for name, group, rounding in CASES:
            seconds, peak = run_measured(
                quantize, str(source), str(target), args.experts, name, group, rounding
            )
            weights = weights_of(config, recipe_of(name, group))
            got = output_of(config, few_bits_reader(target, weights))
            error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
            groups = sorted({w.format.label for w in weights if w.format})
            row = {"format": " / ".join(groups), "rounding": rounding, "seconds": round(seconds, 1), "peak": peak,
                   "bits": round(8 * sum(w.nbytes for w in weights) / count, 3), "error": error}  # fmt: skip
            cells = (
                row["format"],
                rounding,
                f"{seconds:.0f}",
                f"{peak / 1e6:.0f} MB",
                f"{row['bits']:.2f}",
                f"{error:.2e}",
            )
            rows.append("| " + " | ".join(map(str, cells)) + " |")
            print(json.dumps(row) if args.json else rows[-1], flush=True)
    if args.output:
        args.output.write_text(
            replaced(args.output.read_text(encoding="utf-8"), "real", "\n".join(rows)),
            encoding="utf-8",
        )


def replaced(text: str, name: str, rows: str) -> str:
    """The document with its table exchanged."""
    start, end = f"<!-- {name}: made by tools/quantize_real.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{rows}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
