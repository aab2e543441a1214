"""Bundle to bundle: the graphs of a plan, and the weights quantized a piece at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from twotower import __version__
from twotower.builders.base import Report
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    MANIFEST_FILE,
    REPORT_FILE,
    Bundle,
    FileRecord,
    file_records,
    link_file,
    require_room,
    unpublished,
    write_json,
)
from twotower.calibration.quantization_plan import QuantizationPlan, quantizable_of
from twotower.calibration.quantized_data import FloatWeights, stream_quantized
from twotower.errors import BundleError
from twotower.export.graph_files import save_program
from twotower.files import byte_counter
from twotower.graph_lint import require_clean
from twotower.records import encode
from twotower.weights.declared import lay_out


def quantize_bundle(
    bundle: Bundle,
    plan: QuantizationPlan,
    output: Path,
    *,
    report: Report | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Bundle:
    """Writes the quantized bundle; its folder appears whole or not at all.

    Memory stays at a few pieces of a million weights. `report` is called with (what, bytes done,
    bytes in all); `extra` are more facts for the manifest's `quantization`.

    Raises:
        BundleError: the folder exists, the disk is too small or fails.
    """
    require_room(output, plan.nbytes, error=BundleError, smaller="or choose another disk with -o")
    notes = []
    for name, graph in plan.graphs.items():
        found = require_clean(
            ir.to_proto(graph.model),
            f"the quantized {name} graph",
            error=BundleError,
            do="report this: it is a defect of twotower; nothing was written",
        )
        notes += [{"graph": name, **note.to_json()} for note in found]
    try:
        with unpublished(output) as folder:
            files = _write_graphs(folder, bundle, plan, report)
            (folder / REPORT_FILE).parent.mkdir(exist_ok=True)
            write_json(folder / REPORT_FILE, {"quantized_from": bundle.path.name, "notes": notes})
            manifest = _manifest(bundle, plan, extra or {})
            manifest["files"] = encode(file_records(folder, files))
            write_json(folder / MANIFEST_FILE, manifest)
    except OSError as e:
        raise BundleError(
            f"quantizing to '{output}' failed while writing",
            found=str(e),
            do="free disk space or check permissions; nothing was left behind",
        ) from e
    return Bundle.open(output, contents=False)


def _write_graphs(
    folder: Path, bundle: Bundle, plan: QuantizationPlan, report: Report | None
) -> dict[str, FileRecord]:
    """Writes graphs, weights and tokenizer; what is known of the files already."""
    files: dict[str, FileRecord] = {}
    tick = byte_counter(report, "quantizing weights", plan.nbytes) if report else None
    for name, relative in GRAPH_FILES.items():
        graph, data, refs = plan.graphs[name], relative + DATA_SUFFIX, bundle.weights(name)
        (folder / relative).parent.mkdir(exist_ok=True)
        if any(w.format for w in graph.weights):
            source = FloatWeights(bundle.path / data, refs, bundle.dtype)
            files[data] = stream_quantized(
                folder / data, graph.weights, source, rounding=plan.config.rounding, tick=tick
            )
            places = lay_out(graph.weights)
        else:
            # Nothing of this graph changes: its weights stay where the export, maybe of another
            # version, put them.
            link_file(bundle.path / data, folder / data)
            files[data] = bundle.files[data]
            places = {w.name: refs[w.name] for w in graph.weights}
            if tick:
                tick(sum(w.nbytes for w in graph.weights))
        save_program(folder / relative, graph, places)
    for file, record in bundle.files.items():
        if file.startswith("tokenizer/"):
            (folder / file).parent.mkdir(exist_ok=True)
            link_file(bundle.path / file, folder / file)
            files[file] = record
    return files


def _manifest(bundle: Bundle, plan: QuantizationPlan, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest but for its files."""
    manifest: dict[str, Any] = json.loads((bundle.path / MANIFEST_FILE).read_text(encoding="utf-8"))
    labels: dict[str, set[str]] = {}
    for weight in quantizable_of(bundle).values():
        how = plan.recipe.format_of(weight)
        label = how.label if how else bundle.dtype
        if plan.recipe.quantizes_input_of(weight):
            label += ", inputs too"
        labels.setdefault(weight.kind, set()).add(label)
    manifest["precision"] |= {kind: " / ".join(sorted(found)) for kind, found in labels.items()}
    manifest["twotower"] = __version__
    manifest["requires"] = sorted({*bundle.requires, "quantization"})
    manifest["quantization"] = {
        "recipe": {"name": plan.recipe.name, **plan.recipe.to_json()},
        "options": asdict(plan.config),
        "formats": sorted({how.name for how in plan.precision.weights.values()}),
        "activations": {name: asdict(how) for name, how in plan.precision.activations.items()},
        "statistics": plan.statistics,
        "source": source_identity(bundle),
        "measured": None,
        **extra,
    }
    return manifest


def source_identity(bundle: Bundle) -> dict[str, str]:
    """The identity of a bundle's graphs and weights, by which a quantized one names its source."""
    return {name: bundle.graph_identity(name) for name in GRAPH_FILES}
