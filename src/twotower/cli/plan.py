"""`twotower plan`: what a model will take, from headers or a config.json alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.cli.options import adder, byte_size, given_fields, number_list
from twotower.hardware import TARGETS
from twotower.units import format_bytes

if TYPE_CHECKING:
    from twotower.config import ModelConfig
    from twotower.hardware import Machine
    from twotower.planning import GpuModel, PlanOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add(
        "path CHECKPOINT|BUNDLE|CONFIG",
        "a checkpoint (local folder or hub id), a bundle, or a config.json",
    )
    add(
        "--target T",
        f"what would be built: {', '.join(TARGETS)}",
        default="rtx",
    )
    add("--dtype D", "float32, float16 or bfloat16 (default: the checkpoint's or bundle's)")
    add(
        "--experts R",
        "routed experts in int8, fp8, int4 or nvfp4, as `twotower quantize` makes them",
    )
    add(
        "--expert-path P",
        "what computes experts: `kernels` of our own (rtx, trt; SM 80 and later) or a `fused` "
        "operator (ort-cuda) compute those that a token chose, `dense` engines all of them; `auto` "
        "plans what `twotower build` takes by itself: the chosen ones where it can",
        default="auto",
    )
    add("--mode M", "diffusion: both towers; ar: the context tower alone", default="diffusion")
    add("--max-batch N", "most rows", default=8)
    add(
        "--max-context N",
        "longest text, prompt and answer (default: 4096 or the model's)",
        type=int,
    )
    add(
        "--max-build-memory SIZE",
        "of rtx, trt: cut towers whose engines hold weights, so that the build of each stays "
        "below this, e.g. 16G",
    )
    add("--sm LIST", "of rtx: compute capabilities to build for, e.g. 86,89,120")
    add("--gpu NAME", "a GPU, e.g. 'RTX 4090' or '2x H100', or all (default: those here, or all)")
    add("--devices N", "spread over N GPUs: a tower each, or segments of them", default=1)
    add(
        "--disk-rate RATE",
        "bytes a second the disk with the bundle is read at, e.g. 7G (default: 3G, assumed)",
    )
    add("--fit", "exit with 2 unless the plan fits one of the GPUs it is compared with")
    add("--json", "print one JSON object on stdout")
    parser.epilog = (
        "Exits with 2, and with what would fit, if the plan fits no GPU of --gpu NAME, none of\n"
        "the GPUs of this machine, or, with --fit, none of the table. On a machine without a GPU\n"
        "and without these options the table is information and the exit code is 0.\n"
        "Times of passes, and the number of denoising passes a block at which AR is as fast, are\n"
        "arithmetic, for 1, 8, 32 and --max-batch rows: of E experts N tokens that choose k each\n"
        "read E (1 - (1 - k/E)^N), if routing is even; times are lower bounds of a GPU.\n"
        "Target ort-cpu is compared with this machine's memory, and refused with --fit only.\n"
        "Nothing is started, nothing is written.\n"
        "example: twotower plan CHECKPOINT --target trt --gpu H200"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.hardware import probe_machine
    from twotower.planning import (
        PlanOptions,
        describe_fits,
        describe_plan,
        fit,
        on_gpus,
        plan_bundle,
        refusal,
    )

    given = {
        **given_fields(args, PlanOptions),
        "max_build_memory": byte_size(args.max_build_memory, "--max-build-memory"),
        "sms": number_list(args.sm, "--sm", "86,89,120", int),
        "disk_rate": byte_size(args.disk_rate, "--disk-rate"),
    }
    config, options = _source(args.path, PlanOptions(**given))
    machine = probe_machine()
    gpus, concrete = _gpus(args.gpu, options, machine)
    plan = plan_bundle(config, on_gpus(options, [gpu.sm for gpu in gpus]) if concrete else options)
    fits = fit(config, options, gpus)
    if (concrete or args.fit) and not any(f.fits for f in fits):
        raise refusal(plan, fits)
    if args.json:
        gpus_told = [f.to_json() for f in fits]
        print(json.dumps({"path": args.path, **plan.to_json(), "gpus": gpus_told}))
        return 0
    lines = describe_plan(plan)
    if plan.build_peak and machine.available:
        enough = plan.build_peak <= machine.available
        verdict = "enough" if enough else "not enough for the build; see --max-build-memory"
        size = format_bytes(machine.available)
        lines.append(f"this host   {size} of memory available: {verdict}")
    print("\n".join([*lines, *describe_fits(plan, fits)]))
    return 0


def _source(name: str, options: PlanOptions) -> tuple[ModelConfig, PlanOptions]:
    """The model, and the options completed from its files; only headers are read."""
    from twotower.bundle import Bundle, is_bundle
    from twotower.config.model import read_model_config

    path = Path(name)
    if is_bundle(path):
        bundle = Bundle.open(path, contents=False)
        # Layers that a recipe treats otherwise than their kind are counted as their kind.
        recipe = (bundle.quantization or {"recipe": {"weights": {}}})["recipe"]
        return bundle.config, replace(
            options,
            dtype=options.dtype or bundle.dtype,
            block_size=bundle.trained_block_size,
            formats=tuple(sorted(recipe["weights"].items())),
            rounded=tuple(sorted(recipe.get("activations", ()))),
        )
    if path.is_file() or path.suffix == ".json":
        return read_model_config(path), options
    if path.is_dir() and not any(path.glob("*.safetensors")) and (path / "config.json").is_file():
        return read_model_config(path / "config.json"), options
    from twotower.export import Checkpoint, locate_checkpoint

    checkpoint = Checkpoint.open(locate_checkpoint(name))
    known = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return checkpoint.config, replace(options, checkpoint_bytes=known)


def _gpus(
    name: str | None, options: PlanOptions, machine: Machine
) -> tuple[tuple[GpuModel, ...], bool]:
    """The GPUs to compare the plan with, and whether they are those of a certain machine."""
    from twotower.errors import ConfigError
    from twotower.planning import GPUS, GpuModel, gpu_at_hand, gpus_named

    if options.target == "ort-cpu":
        if name:
            raise ConfigError(
                "target ort-cpu uses no GPU",
                found=f"--gpu {name!r}",
                do="leave --gpu out, or plan another --target",
            )
        return (GpuModel("this machine", machine.memory, 0),), False
    if name:
        return gpus_named(name), name.strip().lower() != "all"
    here = gpu_at_hand(machine.gpus)
    return (here, True) if here else (GPUS, False)
