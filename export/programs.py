"""A bundle of graphs alone, from a config.json: enough to build engines for a model that is elsewhere."""

from __future__ import annotations

from pathlib import Path

from twotower.bundle import GRAPH_FILES, REPORT_FILE, Bundle, require_room, unpublished, write_json
from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import ExportError
from twotower.export.exporter import ExportConfig, graph_notes
from twotower.export.graph_files import save_program
from twotower.export.graphs import build_graph
from twotower.export.manifest import base_manifest, write_manifest
from twotower.weights.declared import lay_out

__all__ = ["export_programs"]


def export_programs(config: ModelConfig, output: Path, options: ExportConfig | None = None, *, name: str = "config") -> Bundle:
    """Writes the graphs of a model and the tables of its weights, and no weights.

    The graphs are those an export of a checkpoint with this config writes, to the byte: engines that
    are built from them are found again, by their graphs, when the checkpoint is exported. Takes a
    second and some megabytes whatever the size of the model.

    Args:
        config: The model.
        output: The folder to make; it must not exist.
        options: As of an export.
        name: What the model is called in `bundle.json`.

    Raises:
        ExportError: the folder exists or cannot be written, or a graph breaks a rule (graph_lint).
    """
    chosen = options or ExportConfig()
    dtype = chosen.dtype or config.dtype
    graphs = {graph: build_graph(graph, config, dtype) for graph in GRAPH_FILES}
    notes = graph_notes(graphs)
    require_room(output, 0, error=ExportError, smaller="or choose another disk with -o")
    manifest = base_manifest(
        config,
        dtype,
        defaults=chosen.defaults or GenerationConfig(),
        trained_block_size=chosen.trained_block_size,
    )
    manifest["requires"] = ["no-weights"]
    manifest["source"] = {"name": name, "dtype": config.dtype, "shards": {}}
    try:
        with unpublished(output) as folder:
            for graph, relative in GRAPH_FILES.items():
                (folder / relative).parent.mkdir(exist_ok=True)
                save_program(folder / relative, graphs[graph], lay_out(graphs[graph].weights))
            (folder / REPORT_FILE).parent.mkdir()
            write_json(folder / REPORT_FILE, {"verified": False, "why": "no weights", "notes": notes})
            write_manifest(folder, manifest, {})
    except OSError as e:
        raise ExportError(
            f"the graphs could not be written to '{output}'",
            found=str(e),
            do="free disk space or check permissions; nothing was left behind",
        ) from e
    return Bundle.open(output, contents=False)
