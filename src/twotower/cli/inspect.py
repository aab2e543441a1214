"""`twotower inspect`: what a checkpoint, a bundle, an ONNX graph or an engine is, without loading it."""

from __future__ import annotations

import argparse
import json
import mmap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twotower.bundle import (
    Bundle,
    EngineRecord,
    built_targets,
    is_bundle,
    load_engine_record,
    record_problems,
)
from twotower.cli.engine_table import engine_facts, engine_lines
from twotower.cli.expert_words import expert_words
from twotower.cli.program_table import fusion_lines, program_lines
from twotower.errors import EngineMismatchError
from twotower.hardware import TARGETS, Machine, installed_version, probe_machine, select_target

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="CHECKPOINT|BUNDLE|GRAPH.onnx|RTX.engine",
        help="a checkpoint (local folder or hub id), a bundle, an ONNX file or an engine of rtx",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--verify", action="store_true", help="of a bundle: also compare every file's SHA-256"
    )
    parser.epilog = (
        "Reads headers only: two seconds for the published 118 GB. Of a bundle it shows every built engine: what for, at what cost, and\n"
        "whether it runs here; --json has all of each build.json: inputs, profiles, layers by type, and every warning with its reason.\n"
        "Of an ONNX file it lists what TensorRT would refuse or compute wrongly (docs/graph-rules.md); exit code 1 if there is any.\n"
        "Of an engine of TensorRT for RTX it shows the compiled program: kernels, what is fused into each, memory; no GPU is needed.\n"
        "example: twotower inspect bundle"
    )


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if path.suffix == ".onnx":
        facts, lines = _graph(path)
        print(json.dumps(facts) if args.json else "\n".join(lines))
        return int(any(f["severity"] == "error" for f in facts["findings"]))
    if path.suffix == ".engine":
        facts, lines = _engine(path)
        print(json.dumps(facts) if args.json else "\n".join(lines))
        return 0
    facts, lines = (
        _bundle(path, verify=args.verify)
        if is_bundle(path) or (path / "engines").is_dir()
        else _checkpoint(args.path)
    )
    print(json.dumps(facts) if args.json else "\n".join(lines))
    return 0


def _checkpoint(name: str) -> tuple[dict[str, Any], list[str]]:
    from twotower.export import Checkpoint, locate_checkpoint, summarize

    checkpoint = Checkpoint.open(locate_checkpoint(name))
    summary = summarize(checkpoint.config, tensors=checkpoint.tensors)
    shards = {t.file for t in checkpoint.tensors.values()}
    facts = {
        "kind": "checkpoint",
        "path": name,
        "shards": len(shards),
        "tensors": len(checkpoint.tensors),
        **summary.to_json(),
    }
    head = f"checkpoint  {name}: {len(checkpoint.tensors)} tensors in {len(shards)} file(s), all as published"
    return facts, [head, *summary.lines(), f"next        twotower export {name} -o BUNDLE"]


def _bundle(path: Path, *, verify: bool) -> tuple[dict[str, Any], list[str]]:
    from twotower.checkpoint.summary import summarize

    bundle = Bundle.open(path, contents=verify)
    summary = summarize(bundle.config, bundle.dtype)
    machine = probe_machine()
    fitness = _fitness(bundle, machine)
    records = _records(bundle)
    facts = {
        "kind": "bundle",
        "path": str(path),
        "trained_block_size": bundle.trained_block_size,
        "defaults": bundle.defaults.to_json(),
        "eos_token_ids": list(bundle.config.eos_token_ids),
        "tokenizer": bundle.tokenizer_file is not None,
        "source": bundle.source,
        "tools": bundle.tools,
        "engines": fitness,
        "quantization": bundle.quantization,
        "builds": {
            target: engine_facts(record, fitness[target]) for target, record in records.items()
        },
        **summary.to_json(),
    }
    text = "text and token ids" if bundle.tokenizer_file else "token ids only (no tokenizer)"
    return facts, [
        f"bundle      {path}: from checkpoint {bundle.source['name']}, {text}",
        *summary.lines(),
        *_quantization(bundle),
        f"block size  {bundle.trained_block_size} as trained; threshold {bundle.defaults.confidence_threshold} by default",
        *(
            f"{'engines' if i == 0 else '':<12}{target}: {state}"
            for i, (target, state) in enumerate(fitness.items())
        ),
        *(
            line
            for target, record in records.items()
            for line in ("", *engine_lines(record, fitness[target]))
        ),
    ]


def _quantization(bundle: Bundle) -> list[str]:
    """What of a bundle is in few bits, and what was measured of it."""
    from twotower.bundle import GRAPH_FILES, flags_of_bundle
    from twotower.cli.progress import human_bytes

    facts = bundle.quantization
    if facts is None:
        return []
    size = sum(ref.nbytes for graph in GRAPH_FILES for ref in bundle.weights(graph).values())
    kinds = ", ".join(
        f"{kind} {how}"
        for kind, how in bundle.precision.items()
        if kind in facts["recipe"]["weights"]
    )
    kinds = f"{kinds}; {human_bytes(size)} of weights in all"
    words = expert_words(facts["recipe"], bundle.dtype)
    computed = [f"            {label}{': ' if label else ''}{line}" for label, line in words]
    measured = facts["measured"]
    if measured is None:
        return [
            f"few bits    recipe {facts['recipe']['name']}: {kinds}",
            *computed,
            "            not measured: `twotower evaluate` it --against the float bundle",
        ]
    kept, passes = measured["retention"]["value"], measured["passes_per_block"]
    figures = (
        f"keeps {kept:.1f} % of the float bundle's right answers"
        if kept is not None
        else "keeps nothing"
    )
    return [
        f"few bits    recipe {facts['recipe']['name']}: {kinds}",
        *computed,
        f"            {figures}, passes a block {passes[0]} before and {passes[1]} after",
        *(f"            FLAGGED: {flag}" for flag in flags_of_bundle(bundle)),
    ]


def _graph(path: Path) -> tuple[dict[str, Any], list[str]]:
    from twotower.errors import ConfigError
    from twotower.extras import require_libraries

    require_libraries("cpu", "onnx", what="inspecting an ONNX file")
    from google.protobuf.message import DecodeError

    from twotower.graph_lint import explained, lint
    from twotower.weights.external import load_graph

    try:
        model = load_graph(path)
    except (OSError, DecodeError) as e:
        raise ConfigError(f"cannot read '{path}'", found=str(e), do="name an ONNX file") from e
    if not model.graph.node:
        raise ConfigError(
            f"'{path}' is no ONNX graph", found="there is no operator in it", do="name an ONNX file"
        )
    findings = lint(model)
    opset = next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None
    )
    graph = {
        "operators": len(model.graph.node),
        "inputs": len(model.graph.input),
        "outputs": len(model.graph.output),
    }
    facts = {
        "kind": "graph",
        "path": str(path),
        "opset": opset,
        **graph,
        "findings": [f.to_json() for f in findings],
    }
    counts = ", ".join(f"{count} {name}" for name, count in graph.items())
    return facts, [
        f"graph       {path}: opset {opset}, {counts}",
        *(
            f"{'TensorRT' if i == 0 else '':<12}{line}"
            for i, line in enumerate(explained(findings) or ["nothing to complain of"])
        ),
    ]


def _engine(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The compiled programs of an engine file; one of another library is refused."""
    from twotower.builders.trt.rtx_program.analysis import summarize_programs
    from twotower.builders.trt.rtx_program.read import read_programs
    from twotower.errors import ConfigError

    try:
        with path.open("rb") as file:
            programs = read_programs(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as e:
        do = "name an engine: BUNDLE/engines/rtx/denoiser.engine"
        raise ConfigError(f"cannot read '{path}'", found=str(e), do=do) from e
    told = summarize_programs(programs)
    kernels = [[asdict(kernel) for kernel in program.kernels] for program in programs]
    facts = {"kind": "engine", "path": str(path), **told, "kernels": kernels}
    return facts, [
        f"engine      {path}: TensorRT for RTX, profiles {', '.join(str(p.profile) for p in programs)}",
        *program_lines({path.name: told}, {}),
        *fusion_lines(told["programs"]),
    ]


def _records(bundle: Bundle) -> dict[str, EngineRecord]:
    """Every `build.json` that can be read; one that cannot is told among the fitness."""
    out = {}
    for target in built_targets(bundle.path):
        try:
            out[target] = load_engine_record(bundle, target)
        except EngineMismatchError:
            continue
    return {target: record for target, record in out.items() if target in TARGETS}


def _fitness(bundle: Bundle, machine: Machine) -> dict[str, str]:
    """For every target, whether this machine would run it and why not."""
    built = built_targets(bundle.path)
    out = {}
    for target in TARGETS:
        try:
            select_target(machine, built, wanted=target)
            out[target] = "built, fits this machine"
        except EngineMismatchError as e:
            out[target] = e.found.removeprefix(f"{target}: ")
        if target in built:
            out[target] = _with_record(bundle, target, machine, state=out[target])
    return out


def _with_record(bundle: Bundle, target: str, machine: Machine, *, state: str) -> str:
    """The state with what the record itself says against it. Contents are not hashed: that is for whoever opens the engine."""
    try:
        record = load_engine_record(bundle, target)
    except EngineMismatchError as e:
        return f"{e.what}: {e.found}"
    version = installed_version(machine, target)
    library = {**record.library, "version": version} if version else None
    problems = record_problems(
        record, bundle, target, library=library, sm=machine.gpus[0].sm if machine.gpus else None
    )
    problems += (
        []
        if bundle.has_weights
        else ["the bundle holds no weights: its engines are for an export of the checkpoint"]
    )
    if not problems:
        return state if state.startswith("built") else f"built; cannot run here: {state}"
    against = [] if state.startswith("built") else [state]
    return f"built; does not fit: {'; '.join([*problems, *against])}"
