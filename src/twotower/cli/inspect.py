"""`twotower inspect`: what a checkpoint, bundle, graph or engine contains, without loading it."""

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
from twotower.cli.engine_table import EngineReport, fusion_lines, program_lines
from twotower.cli.expert_words import expert_words
from twotower.cli.options import adder
from twotower.errors import ConfigError, EngineMismatchError
from twotower.hardware import TARGETS, Machine, installed_version, probe_machine, select_target
from twotower.report.tables import labelled
from twotower.units import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add(
        "path CHECKPOINT|BUNDLE|GRAPH.onnx|RTX.engine",
        "a checkpoint (local folder or hub id), a bundle, an ONNX file or an engine of rtx",
    )
    add("--json", "print one JSON object on stdout")
    add("--verify", "of a bundle: also compare every file's SHA-256")
    parser.epilog = (
        "Reads headers only: two seconds for the 110 GiB of the published checkpoint.\n"
        "Of a bundle it shows every built engine: what it is for, what the build took, and\n"
        "whether it runs here; --json has all of each build.json: inputs, profiles, layers by\n"
        "type, and every warning with its reason. Of an ONNX file it lists what TensorRT would\n"
        "refuse or compute wrongly (docs/graph-rules.md); exit code 1 if there is any. Of an\n"
        "engine of TensorRT for RTX it shows the compiled program: kernels, what is fused into\n"
        "each, memory; no GPU is needed.\n"
        "example: twotower inspect bundle"
    )


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if path.suffix == ".onnx":
        facts, lines = _graph(path)
    elif path.suffix == ".engine":
        facts, lines = _engine(path)
    elif is_bundle(path) or (path / "engines").is_dir():
        facts, lines = _bundle(path, verify=args.verify)
    else:
        facts, lines = _checkpoint(args.path)
    print(json.dumps(facts) if args.json else "\n".join(lines))
    return int(any(f["severity"] == "error" for f in facts.get("findings", ())))


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
    tensors = f"{len(checkpoint.tensors)} tensors in {len(shards)} file(s), all as published"
    return facts, [
        f"checkpoint  {name}: {tensors}",
        *summary.lines(),
        f"next        twotower export {name} -o BUNDLE",
    ]


def _bundle(path: Path, *, verify: bool) -> tuple[dict[str, Any], list[str]]:
    from twotower.checkpoint.summary import summarize

    bundle = Bundle.open(path, contents=verify)
    summary = summarize(bundle.config, bundle.dtype)
    states, reports = _engines(bundle, probe_machine())
    facts = {
        "kind": "bundle",
        "path": str(path),
        "trained_block_size": bundle.trained_block_size,
        "defaults": bundle.defaults.to_json(),
        "eos_token_ids": list(bundle.config.eos_token_ids),
        "tokenizer": bundle.tokenizer_file is not None,
        "source": bundle.source,
        "tools": bundle.tools,
        "engines": states,
        "quantization": bundle.quantization,
        "builds": {target: report.facts() for target, report in reports.items()},
        **summary.to_json(),
    }
    text = "text and token ids" if bundle.tokenizer_file else "token ids only (no tokenizer)"
    threshold = bundle.defaults.confidence_threshold
    lines = [
        f"bundle      {path}: from checkpoint {bundle.source['name']}, {text}",
        *summary.lines(),
        *labelled("quantized", _quantization(bundle)),
        f"block size  {bundle.trained_block_size} as trained; threshold {threshold} by default",
        *labelled("engines", (f"{target}: {state}" for target, state in states.items())),
    ]
    for report in reports.values():
        lines += ["", *report.lines()]
    return facts, lines


def _quantization(bundle: Bundle) -> list[str]:
    """What of a bundle is quantized, what computes it, and what was measured of it."""
    from twotower.bundle import GRAPH_FILES, flags_of_bundle

    facts = bundle.quantization
    if facts is None:
        return []
    recipe, measured = facts["recipe"], facts["measured"]
    size = sum(ref.nbytes for graph in GRAPH_FILES for ref in bundle.weights(graph).values())
    precision = bundle.precision.items()
    kinds = ", ".join(f"{kind} {how}" for kind, how in precision if kind in recipe["weights"])
    lines = [f"recipe {recipe['name']}: {kinds}; {format_bytes(size)} of weights in all"]
    for label, line in expert_words(recipe, bundle.dtype):
        lines.append(f"{label}: {line}" if label else line)
    if measured is None:
        return [*lines, "not measured: `twotower evaluate` it --against the float bundle"]
    kept, passes = measured["retention"]["value"], measured["passes_per_block"]
    of = "nothing" if kept is None else f"{kept:.1f} % of the float bundle's right answers"
    lines.append(f"keeps {of}, passes a block {passes[0]} before and {passes[1]} after")
    return lines + [f"FLAGGED: {flag}" for flag in flags_of_bundle(bundle)]


def _graph(path: Path) -> tuple[dict[str, Any], list[str]]:
    from twotower.extras import require_libraries

    require_libraries("cpu", "onnx", what="inspecting an ONNX file")
    from google.protobuf.message import DecodeError

    from twotower.graph_lint import explained, lint
    from twotower.weights.external import load_graph

    try:
        model = load_graph(path)
    except (OSError, DecodeError) as e:
        raise ConfigError(
            f"cannot read '{path}'",
            found=str(e),
            do="name an ONNX file",
        ) from e
    if not model.graph.node:
        raise ConfigError(
            f"'{path}' is no ONNX graph", found="there is no operator in it", do="name an ONNX file"
        )
    findings = lint(model)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx"))
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
        *labelled("TensorRT", explained(findings) or ["no issues found"]),
    ]


def _engine(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The compiled programs of an engine file; one of another library is refused."""
    from twotower.builders.trt.rtx_program.analysis import summarize_programs
    from twotower.builders.trt.rtx_program.read import read_programs

    try:
        with path.open("rb") as file:
            programs = read_programs(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as e:
        do = "name an engine: BUNDLE/engines/rtx/denoiser.engine"
        raise ConfigError(
            f"cannot read '{path}'",
            found=str(e),
            do=do,
        ) from e
    told = summarize_programs(programs)
    kernels = [[asdict(kernel) for kernel in program.kernels] for program in programs]
    facts = {
        "kind": "engine",
        "path": str(path),
        **told,
        "kernels": kernels,
    }
    profiles = ", ".join(str(program.profile) for program in programs)
    return facts, [
        f"engine      {path}: TensorRT for RTX, profiles {profiles}",
        *program_lines({path.name: told}, {}),
        *fusion_lines(told["programs"]),
    ]


def _engines(bundle: Bundle, machine: Machine) -> tuple[dict[str, str], dict[str, EngineReport]]:
    """For every target, whether this machine would run it and why not, and of those built a report.

    One whose `build.json` cannot be read has no report: its state says why.
    """
    built = built_targets(bundle.path)
    states: dict[str, str] = {}
    reports = {}
    for target in TARGETS:
        try:
            select_target(machine, built, wanted=target)
            reason = ""
        except EngineMismatchError as e:
            reason = e.found.removeprefix(f"{target}: ")
        if target not in built:
            states[target] = reason
            continue
        try:
            record = load_engine_record(bundle, target)
        except EngineMismatchError as e:
            states[target] = f"{e.what}: {e.found}"
            continue
        problems = _problems(bundle, record, machine)
        if problems:
            states[target] = f"built; does not fit: {'; '.join(filter(None, [*problems, reason]))}"
        else:
            states[target] = (
                f"built; cannot run here: {reason}" if reason else "built, fits this machine"
            )
        reports[target] = EngineReport(record, states[target])
    return states, reports


def _problems(bundle: Bundle, record: EngineRecord, machine: Machine) -> list[str]:
    """What a record says against its engines; contents are hashed by whoever opens them."""
    version = installed_version(machine, record.target)
    library = {**record.library, "version": version} if version else None
    sm = machine.gpus[0].sm if machine.gpus else None
    problems = record_problems(record, bundle, record.target, library=library, sm=sm)
    if not bundle.has_weights:
        problems.append(
            "the bundle holds no weights: its engines are for an export of the checkpoint"
        )
    return problems
