"""`twotower build`: the engines of one target, from a bundle's graphs."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from twotower.bundle import Bundle, is_bundle
from twotower.cli.options import (
    Adder,
    adder,
    byte_size,
    checked_bundle,
    given_fields,
    number_list,
)
from twotower.cli.progress import ProgressLine
from twotower.errors import ConfigError
from twotower.units import format_bytes

if TYPE_CHECKING:
    from twotower.builders import BuildConfig
    from twotower.bundle import EngineRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add("bundle BUNDLE", "a folder made by `twotower export`")
    add("--target T", "what to build for; ort-cpu runs on any machine", default="ort-cpu")
    add(
        "--from-config FILE",
        "make BUNDLE first, of graphs alone, from a config.json: engines hold no weights, so "
        "none are needed to build them",
        type=Path,
    )
    add(
        "--dtype",
        "with --from-config: element type of the graphs (default: the config's)",
        choices=("float32", "float16", "bfloat16"),
    )
    add("--force", "rebuild everything, even what is there or cached")
    add("--dry-run", "print what would be built and what it takes, then stop")
    add("--json", "print the build record as one JSON object on stdout")
    _add_shapes(adder(parser, "what engines are built for"))
    _add_experts(adder(parser, "what computes the experts, and where weights go"))
    _add_cache(adder(parser, "cached engines, of rtx and trt"))
    parser.epilog = (
        "The result lies in BUNDLE/engines/<target>. A fitting engine is kept; a killed build\n"
        "leaves the old one, and the same command resumes after the engines it had finished.\n"
        "`twotower inspect BUNDLE` shows what was built.\n"
        "example: twotower build bundle --target ort-cpu\n"
        "example: twotower build bundle --target rtx --sm 86,89 --dry-run\n"
        "example: twotower build programs --from-config config.json --target rtx --sm 89,120 "
        "--cache engines"
    )


def _add_shapes(add: Adder) -> None:
    add(
        "--sm LIST",
        "of rtx, and of ort-cuda with --experts kernels: compute capabilities to build for, "
        "e.g. 86,89,120 (default: the GPU here, or these; of ort-cuda the GPUs here, or all there "
        "are kernels for)",
    )
    add("--max-batch N", "of rtx, trt, and --experts kernels: most rows", default=8)
    add(
        "--max-context N",
        "of rtx, trt: longest text, prompt and answer (default: 4096 or the model's)",
        type=int,
    )
    add(
        "--segments N",
        "of rtx, trt: cut towers into N engines with dense experts, to spread them over GPUs",
        default=1,
    )
    add(
        "--max-build-memory SIZE",
        "of rtx, trt: cut towers whose engines hold weights, so that the build of each stays "
        "below this, e.g. 16G; rarely needed",
    )


def _add_experts(add: Adder) -> None:
    add(
        "--experts",
        "of rtx, trt, ort-cuda: `kernels` cuts towers at every layer of experts and computes "
        "the chosen ones between the programs (SM 80 and later; needs the extra `kernels`); "
        "`fused`, of ort-cuda alone, makes each layer one operator that computes the chosen ones; "
        "`dense` computes every expert for every token in the engine; `auto` takes what computes "
        "the chosen ones if these experts allow it, and otherwise reports why not",
        default="auto",
        choices=("auto", "kernels", "fused", "dense"),
    )
    add(
        "--weights",
        "of rtx, trt: `inputs` builds programs that read the bundle's weights and hold only "
        "what the library takes as constants; `inside` puts all weights into the engines",
        default="inputs",
        choices=("inputs", "inside"),
    )
    add(
        "--allow-expanded",
        "of rtx: keep engines that expand quantized experts in device memory in every pass, "
        "which is slower than float experts",
    )
    add(
        "--dialect",
        "of ort-cpu: `chosen` engines compute only the experts that a token chose; "
        "`standard` ones keep the exported graph, which computes all",
        default="chosen",
        choices=("chosen", "standard"),
    )


def _add_cache(add: Adder) -> None:
    add(
        "--cache DIR",
        "keep built engines here, to share them between bundles (default: in the bundle, "
        "where an engine in use and its entry are one file)",
        type=Path,
    )
    add(
        "--cache-size SIZE",
        "room for cached engines that no target uses; the least recently used are deleted first",
        default="20G",
    )
    add("--no-cache", "neither take engines from the cache nor keep them there")


def run(args: argparse.Namespace) -> int:
    from twotower.builders import build_engines, builder_for
    from twotower.bundle import BUILD_FILE, engine_folder

    if args.dtype and not args.from_config:
        raise ConfigError(
            "--dtype is for --from-config",
            found="the bundle's own graphs are built",
            do="export with another --dtype",
        )
    builder = builder_for(args.target)
    try:
        # A dry run writes nothing: graphs it needs go to a folder that is gone at the end.
        with ProgressLine() as line, ExitStack() as scratch:
            bundle = (
                _of_graphs_alone(args, scratch) if args.from_config else checked_bundle(args.bundle)
            )
            config = _config(args)
            if args.dry_run:
                library, plan = builder.library(), builder.plan(bundle, config)
                size = format_bytes(plan.needed_bytes)
                print(f"{args.target}: {library['name']} {library['version']}, {size} of disk")
                print("\n".join(plan.describe()))
                return 0
            file = engine_folder(bundle, args.target) / BUILD_FILE
            before = file.stat().st_mtime_ns if file.is_file() else None
            record = build_engines(bundle, args.target, builder, config=config, report=line)
    except KeyboardInterrupt:
        if args.target in ("rtx", "trt") and not args.no_cache:
            print(
                "finished engines are in the cache: the same command resumes after them",
                file=sys.stderr,
            )
        raise
    if args.json:
        print(json.dumps(record.to_json()))
    _report(args, record, kept=file.stat().st_mtime_ns == before)
    return 0


def _config(args: argparse.Namespace) -> BuildConfig:
    from twotower.builders import BuildConfig

    given = {
        **given_fields(args, BuildConfig),
        "sms": number_list(args.sm, "--sm", "86,89,120", int),
        "max_build_memory": byte_size(args.max_build_memory, "--max-build-memory"),
        "use_cache": not args.no_cache,
        "cache_bytes": byte_size(args.cache_size, "--cache-size") or 0,
    }
    return BuildConfig(**given)


def _of_graphs_alone(args: argparse.Namespace, scratch: ExitStack) -> Bundle:
    """The bundle of a config.json: made now, or by an earlier run of the same command."""
    from twotower.config import read_model_config
    from twotower.extras import require_libraries

    require_libraries("export", "onnx", "onnx_ir", what="building from a config.json")
    from twotower.export import ExportConfig, export_programs

    config = read_model_config(args.from_config)
    dtype = args.dtype or config.dtype
    folder = Path(args.bundle)
    if not is_bundle(folder):
        if args.dry_run:
            folder = Path(scratch.enter_context(TemporaryDirectory())) / "bundle"
        name = args.from_config.resolve().parent.name
        return export_programs(config, folder, ExportConfig(dtype=dtype), name=name)
    bundle = Bundle.open(folder)
    if bundle.has_weights:
        found = "it holds weights"
    elif (bundle.config, bundle.dtype) != (config, dtype):
        found = f"it is of another model, or {bundle.dtype}"
    else:
        return bundle
    raise ConfigError(
        f"bundle '{args.bundle}' is not of {args.from_config}",
        found=found,
        do="name a new folder, or leave --from-config out to build for that bundle",
    )


def _report(args: argparse.Namespace, record: EngineRecord, *, kept: bool) -> None:
    """Prints what was built, and why experts are dense if nobody asked for that."""
    size = format_bytes(sum(file.size for file in record.files.values()))
    library = f"{record.library['name']} {record.library['version']}"
    made = f"built in {record.report.get('seconds')} s with {library}"
    observed = record.report.get("engines", {}).values()
    cached = sum(bool(facts["cached"]) for facts in observed)
    if kept:
        made += "; kept, because it fits"
    elif cached:
        made += f", {cached} of {len(observed)} engines from the cache"
    print(f"{args.bundle}/engines/{args.target}: {size}, {made}", file=sys.stderr)
    choice = record.report.get("choice_of_experts", {})
    if args.experts == "auto" and choice.get("why"):
        print(f"note: experts are dense: {choice['why']}; {choice['cost']}", file=sys.stderr)
