"""Checkpoint to bundle: record the graphs, stream the weights, verify, publish by one rename.

From a config alone, the same without weights.
"""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import Any

import onnx_ir as ir

from twotower import __version__
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    MANIFEST_FILE,
    REPORT_FILE,
    SCHEMA,
    TOKENIZER_FILE,
    Bundle,
    FileRecord,
    file_records,
    require_room,
    unpublished,
    write_json,
)
from twotower.checkpoint.generation_defaults import read_defaults
from twotower.checkpoint.reader import Checkpoint
from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import CheckpointError, ConfigError, ExportError
from twotower.export.graph_files import save_program
from twotower.export.graphs.recorder import OPSET
from twotower.export.graphs.tower_graphs import TowerGraph, build_graph
from twotower.graph_lint import require_clean
from twotower.records import encode
from twotower.spec import signatures
from twotower.weights.declared import lay_out
from twotower.weights.writer import stream_weights

DTYPES = ("float32", "float16", "bfloat16")
TRAINED_BLOCK_SIZE = 16
logger = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]
Verifier = Callable[[Path, Checkpoint, str, Report], dict[str, Any]]
"""Checks an unpublished bundle folder against the checkpoint: its report, or an ExportError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Options of one export.

    Attributes:
        dtype: `float32`, `float16` or `bfloat16`; None keeps the checkpoint's. The SSM state is
            always float32.
        trained_block_size: S the denoiser was trained with; generation refuses larger blocks.
        defaults: Generation defaults stored in the bundle; None takes the checkpoint's
            (`read_defaults`).
    """

    dtype: str | None = None
    trained_block_size: int = TRAINED_BLOCK_SIZE
    defaults: GenerationConfig | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(
                f"cannot export as {self.dtype!r}",
                found=f"allowed: {', '.join(DTYPES)}",
                do="choose one with --dtype",
            )
        if self.trained_block_size < 1:
            found = f"{self.trained_block_size}; allowed: 1 and more"
            raise ConfigError(
                "no denoiser was trained with that block size",
                found=found,
                do="name the trained one with --block-size",
            )


def export_bundle(
    checkpoint: Checkpoint,
    output: Path,
    config: ExportConfig | None = None,
    *,
    verify: Verifier | None = None,
    report: Report | None = None,
) -> Bundle:
    """Exports an opened (and so checked) checkpoint into a new bundle folder.

    It is written under a hidden name and renamed at the end, so it appears whole or not at all.
    Without `verify` it is published unverified; `report` is called with (what is being done, bytes
    done, bytes in all).

    Raises:
        ExportError: the folder exists, the disk is too small or full, a graph breaks a rule
            (graph_lint), a value overflows, or verification fails.
        CheckpointError: its tokenizer.json is not a tokenizer.
    """
    check_tokenizer(checkpoint.path)
    options = config or ExportConfig()
    dtype = options.dtype or checkpoint.config.dtype
    graphs = {name: build_graph(name, checkpoint.config, dtype) for name in GRAPH_FILES}
    notes = _graph_notes(graphs)
    total = sum(w.nbytes for graph in graphs.values() for w in graph.weights)
    smaller = "choose another disk with -o, or a smaller --dtype"
    require_room(output, total, error=ExportError, smaller=smaller)
    manifest = _manifest(
        checkpoint.config, options, options.defaults or read_defaults(checkpoint.path)
    )
    source = {"name": checkpoint.path.name, "dtype": checkpoint.config.dtype}
    tell = report or (lambda what, done, total: None)
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        tell("writing weights", min(done, total), total)

    files: dict[str, FileRecord] = {}
    do = (
        "free disk space, check permissions, and that checkpoint and output are as they were at "
        "the start; nothing was left behind"
    )
    with _published(output, f"the export to '{output}' failed while writing", do) as folder:
        with identity_in_background(checkpoint) as shards:
            for name, relative in GRAPH_FILES.items():
                (folder / relative).parent.mkdir(exist_ok=True)
                weights, data = graphs[name].weights, relative + DATA_SUFFIX
                files[data] = stream_weights(folder / data, weights, checkpoint, tick=tick)
                save_program(
                    folder / relative,
                    graphs[name],
                    lay_out(weights),
                )
            manifest["source"] = {**source, "shards": shards.result()}
        copy_tokenizer(checkpoint.path, folder)
        outcome: dict[str, Any] = {"verified": False, "why": "not asked for"}
        if verify:
            outcome = verify(folder, checkpoint, dtype, tell)
        _write_records(folder, manifest, {**outcome, "notes": notes}, files)
    return Bundle.open(output, contents=False)


@contextmanager
def _published(
    output: Path,
    failed: str,
    do: str,
) -> Iterator[Path]:
    """The unpublished folder of a bundle, where an error of the disk is one of the export."""
    try:
        with unpublished(output) as folder:
            yield folder
    except OSError as e:
        raise ExportError(failed, found=str(e), do=do) from e


def _graph_notes(graphs: dict[str, TowerGraph]) -> list[dict[str, str]]:
    """What the graphs cost on TensorRT, before a byte of weights is written."""
    notes = []
    for name, graph in graphs.items():
        do = "report this: it is a defect of twotower; nothing was written"
        for note in require_clean(
            ir.to_proto(graph.model), f"the {name} graph", error=ExportError, do=do
        ):
            logger.info("%s: %s", name, note)
            notes.append({"graph": name, **note.to_json()})
    return notes


@contextmanager
def identity_in_background(checkpoint: Checkpoint) -> Iterator[Future[dict[str, dict[str, Any]]]]:
    """Hashes the checkpoint beside the writer, which leaves the shards in the page cache.

    A block that fails does not wait for the rest of 118 GB.
    """
    stopped = Event()

    def tick(count: int) -> None:
        if stopped.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1) as background:
        try:
            yield background.submit(checkpoint.identity, tick)
        except BaseException:
            stopped.set()
            raise


_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def check_tokenizer(source: Path) -> None:
    """Refuses (CheckpointError) a `tokenizer.json` the runtime could not open; none is fine."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - only where there is a file

    path = source / _NAMES[0]
    if not path.is_file():
        return
    do = "download it again, or remove it to export a bundle that takes token ids only"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(
            f"cannot read {path}",
            found=str(e),
            do=do,
        ) from e
    try:
        Tokenizer.from_str(text)
    except Exception as e:  # the library raises plain Exception for every fault of a file
        raise CheckpointError(
            f"{path} is not a tokenizer",
            found=str(e),
            do=do,
        ) from e


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Takes what a tokenizer needs along; without one the bundle is for token ids only."""
    target = (folder / TOKENIZER_FILE).parent
    for name in _NAMES:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def export_programs(
    config: ModelConfig,
    output: Path,
    options: ExportConfig | None = None,
    *,
    name: str = "config",
) -> Bundle:
    """Writes the graphs of a model and the tables of its weights, and no weights.

    The graphs equal those of an export of a checkpoint with this config, to the byte, so engines
    built from them are found again when the checkpoint is exported. Takes a second and some
    megabytes whatever the size of the model. `name` is what `bundle.json` calls the model.

    Raises:
        ExportError: the folder exists or cannot be written, or a graph breaks a rule (graph_lint).
    """
    chosen = options or ExportConfig()
    dtype = chosen.dtype or config.dtype
    graphs = {graph: build_graph(graph, config, dtype) for graph in GRAPH_FILES}
    notes = _graph_notes(graphs)
    require_room(output, 0, error=ExportError, smaller="or choose another disk with -o")
    manifest = _manifest(config, chosen, chosen.defaults or GenerationConfig())
    manifest["requires"] = ["no-weights"]
    manifest["source"] = {"name": name, "dtype": config.dtype, "shards": {}}
    do = "free disk space or check permissions; nothing was left behind"
    with _published(output, f"the graphs could not be written to '{output}'", do) as folder:
        for graph, relative in GRAPH_FILES.items():
            (folder / relative).parent.mkdir(exist_ok=True)
            save_program(
                folder / relative,
                graphs[graph],
                lay_out(graphs[graph].weights),
            )
        outcome = {"verified": False, "why": "no weights", "notes": notes}
        _write_records(folder, manifest, outcome, {})
    return Bundle.open(output, contents=False)


def _manifest(
    config: ModelConfig,
    options: ExportConfig,
    defaults: GenerationConfig,
) -> dict[str, Any]:
    """All of a manifest but its source and its files."""
    dtype = options.dtype or config.dtype
    tools = {"opset": str(OPSET), "python": platform.python_version()}
    for name in ("onnx-ir", "onnx", "onnxruntime", "torch", "numpy"):
        with suppress(PackageNotFoundError):
            tools[name] = version(name)
    return {
        "schema": SCHEMA,
        "requires": [],
        "twotower": __version__,
        "model": config.to_json(),
        "dtype": dtype,
        "precision": {
            **dict.fromkeys(_KINDS, dtype),
            **dict.fromkeys(_ALWAYS_FLOAT32, "float32"),
        },
        "generation": {
            "trained_block_size": options.trained_block_size,
            "defaults": defaults.to_json(),
        },
        "signatures": encode(signatures(config, dtype)),
        "tools": tools,
    }


_KINDS = (
    *("embedding", "mamba", "attention", "routed_expert", "shared_expert", "mlp"),
    *("conditioning", "head"),
)
_ALWAYS_FLOAT32 = ("norm", "router", "ssm_state", "ssm_scan", "softmax", "logits")


def _write_records(
    folder: Path,
    manifest: Mapping[str, Any],
    outcome: Mapping[str, Any],
    known: Mapping[str, FileRecord],
) -> None:
    """The report of the export, and `bundle.json`, the last file, which lists all others.

    `known` are files that were hashed while they were written; the others are hashed now.
    """
    (folder / REPORT_FILE).parent.mkdir()
    write_json(folder / REPORT_FILE, outcome)
    listed = encode(file_records(folder, known))
    write_json(folder / MANIFEST_FILE, {**manifest, "files": listed})
