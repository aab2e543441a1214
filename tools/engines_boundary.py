"""The cost of cutting a tower into segments, in ONNX Runtime (`make engines-boundary`).

Both compute the same from the same inputs, in turns; printed are the medians and their ratio, and
the bytes a boundary hands over beside the weights a pass reads. What a boundary costs on a GPU, a
launch of its own included, is not measured by this.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from twotower.builders.segment import Segment, fix_axes, layer_bytes, segment
from twotower.bundle import Bundle
from twotower.checkpoint.synthetic import published_slice, write_checkpoint
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.onnx_runtime import ort, session_options
from twotower.spec import CONDITIONING, DENOISER, RESIDUAL_IN, RESIDUAL_OUT, TensorSpec
from twotower.weights.external import load_graph

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"B": 1, "S": 16, "T": 1280}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pattern", default="MEM*EM", help="layers (%(default)s)")
    parser.add_argument(
        "--experts",
        type=int,
        default=8,
        help="of a layer; 128 are published, and 5.2 GB in float32 (%(default)s)",
    )
    parser.add_argument(
        "--width", type=int, help="another width than the published 2688, for a quick look"
    )
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each (%(default)s)")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "out" / "engines-boundary", metavar="FOLDER"
    )
    args = parser.parse_args(argv)
    changes: dict[str, Any] = {
        "vocab_size": 4096,
        "n_routed_experts": args.experts,
        "num_experts_per_tok": min(6, args.experts),
    }
    if args.width:
        changes["hidden_size"] = args.width
    shutil.rmtree(args.scratch, ignore_errors=True)
    try:
        checkpoint = write_checkpoint(
            args.scratch / "checkpoint", {**published_slice(args.pattern), **changes}
        )
        bundle = export_bundle(
            Checkpoint.open(checkpoint), args.scratch / "bundle", ExportConfig(dtype="float32")
        )
        return _compare(bundle, args.runs)
    finally:
        shutil.rmtree(args.scratch, ignore_errors=True)


def _compare(bundle: Bundle, runs: int) -> int:
    model = load_graph(bundle.graph_file(DENOISER))
    fix_axes(model, SIZES)
    signature = bundle.signatures[DENOISER].with_sizes(SIZES)
    weights = layer_bytes(model)
    count = len(weights.layers)
    folder = bundle.graph_file(DENOISER).parent
    whole = _sessions([segment(model, signature, (0, count), dtype="float32")], folder)
    pieces = _sessions(
        [segment(model, signature, (i, i + 1), dtype="float32") for i in range(count)], folder
    )
    inputs = _inputs(signature.inputs, bundle.config.vocab_size)
    seconds: dict[str, list[float]] = {"whole": [], "pieces": []}
    results: dict[str, dict[str, Any]] = {}
    for _ in range(runs + 1):
        for name, sessions in (("whole", whole), ("pieces", pieces)):
            began = time.perf_counter()
            results[name] = _run(sessions, inputs)
            seconds[name].append(time.perf_counter() - began)
    same = all(np.array_equal(results["whole"][n], results["pieces"][n]) for n in results["whole"])
    one, many = (median(seconds[name][1:]) for name in ("whole", "pieces"))
    width = bundle.config.hidden_size
    handed = SIZES["B"] * (SIZES["S"] + 3) * width * 4
    config = bundle.config
    print(
        f"{count} layers ({config.pattern}), {width} wide, {config.n_routed_experts} experts, float32, one CPU core"
    )
    print(f"one piece    {1000 * one:.1f} ms")
    print(
        f"{count} pieces     {1000 * many:.1f} ms, {many / one:.3f}x: {1000 * (many - one) / (count - 1):.2f} ms a boundary"
    )
    print(
        f"handed over  {handed / 1e3:.0f} kB a boundary (residual and conditioning); weights read {weights.total / 1e9:.2f} GB"
    )
    print(f"outputs      {'the same to the bit' if same else 'DIFFERENT'}")
    return 0 if same else 1


def _sessions(parts: list[Segment], folder: Path) -> list[tuple[Segment, ort.InferenceSession]]:
    options = session_options(folder, threads=1)
    return [
        (
            p,
            ort.InferenceSession(
                p.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            ),
        )
        for p in parts
    ]


def _inputs(specs: tuple[TensorSpec, ...], vocabulary: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    out: dict[str, Any] = {}
    for spec in specs:
        shape = spec.shape(SIZES)
        whole = spec.dtype == "int64"
        out[spec.name] = (
            rng.integers(4, min(vocabulary, 1000), shape)
            if whole
            else rng.normal(size=shape).astype(np.float32)
        )
    return out


def _run(
    sessions: list[tuple[Segment, ort.InferenceSession]], inputs: dict[str, Any]
) -> dict[str, Any]:
    """Back to back; what one hands over the next finds under its own name."""
    known, outputs = dict(inputs), {}
    for part, session in sessions:
        names = [spec.name for spec in part.outputs]
        made = dict(
            zip(
                names,
                session.run(names, {spec.name: known[spec.name] for spec in part.inputs}),
                strict=True,
            )
        )
        if RESIDUAL_OUT in made:
            known[RESIDUAL_IN] = made.pop(RESIDUAL_OUT)
        if CONDITIONING in made:
            known[CONDITIONING] = made.pop(CONDITIONING)
        outputs.update(made)
    return outputs


if __name__ == "__main__":
    sys.exit(main())
