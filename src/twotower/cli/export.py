"""`twotower export`: a checkpoint becomes a bundle of ONNX graphs, verified against torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from twotower.cli.options import adder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add("checkpoint CHECKPOINT", "a local folder in the published layout, or a hub id")
    add("-o --output BUNDLE", "the folder to make; it must not exist", required=True)
    add(
        "--dtype",
        "element type of weights and residual stream (default: the checkpoint's); the SSM "
        "state is float32 in any case",
        choices=("float32", "float16", "bfloat16"),
    )
    add("--block-size S", "block size the denoiser was trained with", default=16)
    add(
        "--verify",
        "compare ONNX Runtime with the torch towers before publishing; of a model too large "
        "for this machine one layer of each kind",
        action=argparse.BooleanOptionalAction,
        default=True,
    )
    parser.epilog = (
        "Weights are streamed: memory stays small and the disk needs the size of the weights.\n"
        "A killed export leaves no bundle.\n"
        "example: twotower export ./Nemotron-Labs-TwoTower-30B-A3B-Base-BF16 -o bundle"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.extras import require_libraries

    require_libraries("export", "torch", "onnx", "onnx_ir", "safetensors")
    verify = None
    if args.verify:
        what = "comparing the result with the torch towers (--no-verify leaves it out)"
        require_libraries("export,cpu", "onnxruntime", what=what)
        from twotower.export.verify import verify_bundle

        verify = verify_bundle
    from twotower.bundle import REPORT_FILE
    from twotower.cli.progress import ProgressLine
    from twotower.export import Checkpoint, ExportConfig, export_bundle, locate_checkpoint
    from twotower.units import format_bytes

    config = ExportConfig(dtype=args.dtype, trained_block_size=args.block_size)
    with ProgressLine() as line:
        checkpoint = Checkpoint.open(locate_checkpoint(args.checkpoint))
        bundle = export_bundle(checkpoint, Path(args.output), config, verify=verify, report=line)
    size = format_bytes(sum(record.size for record in bundle.files.values()))
    report = json.loads((bundle.path / REPORT_FILE).read_text(encoding="utf-8"))
    verdict = (
        f"verified: {report['layers']}; largest relative error {report['largest_error']:.1e} "
        f"(allowed {report['tolerance']:.0e})"
        if report["verified"]
        else f"not verified: {report['why']}"
    )
    print(
        f"{args.output}: {bundle.config.pattern}, {bundle.dtype}, {size}",
        verdict,
        f"next: twotower build {args.output} --target ort-cpu",
        sep="\n",
        file=sys.stderr,
    )
    return 0
