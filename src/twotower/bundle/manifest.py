"""`bundle.json`: what a bundle is, whether its files are unchanged, and derived bundles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bundle.integrity import check_files
from twotower.config import GenerationConfig, ModelConfig
from twotower.config.formats import FORMATS, WeightFormat
from twotower.errors import BundleError
from twotower.files import (
    FileRecord,
    Progress,
    inside,
    link_file,
    require_new,
    unpublished,
    write_atomically,
)
from twotower.records import RecordError, at_path, decode, encode, stored
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TowerSignature, signatures
from twotower.weights.refs import WeightRef
from twotower.weights.table import TABLE_SUFFIX, read_weight_table

SCHEMA = 2
FEATURES = frozenset({"no-weights", "quantization"})
"""What a reader may be required to know.

`no-weights` marks a bundle of graphs alone, `quantization` one with low-bit weights. A bundle lists
in `requires` what it cannot be read without; other fields that a reader does not know are ignored.
"""

MANIFEST_FILE = "bundle.json"
TOKENIZER_FILE = "tokenizer/tokenizer.json"
REPORT_FILE = "reports/export.json"
GRAPH_FILES = {
    CONTEXT: "context/model.onnx",
    CONTEXT_HEAD: "context/head.onnx",
    DENOISER: "denoiser/model.onnx",
}
DATA_SUFFIX = ".data"
"""A graph's weights lie beside it under the graph's name plus this."""


def is_bundle(path: Path) -> bool:
    """Whether a folder says it is a bundle (it may still be damaged)."""
    return (path / MANIFEST_FILE).is_file()


def write_json(path: Path, data: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True, slots=True)
class _Recipe:
    name: str


@dataclass(frozen=True, slots=True)
class _Quantization:
    """What every reader of a quantized bundle relies on."""

    recipe: _Recipe
    formats: tuple[str, ...]
    measured: dict[str, Any] | None

    def __post_init__(self) -> None:
        unknown = sorted({*self.formats} - FORMATS.keys())
        if unknown:
            raise ValueError(f"formats {', '.join(unknown)} are of another version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened and checked bundle.

    `dtype` is of weights and residual stream, `precision` of every part of the towers by name;
    `presets` were found by `twotower tune`; `source` is where it was exported from, with size and
    SHA-256 of every shard; `quantization` has recipe, options, the original's identity and what was
    measured, None for a float bundle; `requires` are features of `FEATURES` a reader must know.
    """

    path: Path
    config: ModelConfig = field(metadata=stored("model"))
    dtype: str
    precision: dict[str, str]
    trained_block_size: int
    defaults: GenerationConfig
    presets: dict[str, GenerationConfig] = field(default_factory=dict)
    source: dict[str, Any]
    files: dict[str, FileRecord]
    tools: dict[str, str]
    quantization: dict[str, Any] | None = None
    requires: frozenset[str] = frozenset()
    signatures: dict[str, TowerSignature] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "signatures",
            signatures(self.config, self.dtype),
        )

    @classmethod
    def open(
        cls, path: str | Path, *, contents: bool = True, progress: Progress | None = None
    ) -> Bundle:
        """Opens a bundle and checks its files.

        With `contents` SHA-256 are compared too (once; see `check_files`), else sizes alone.
        `progress` is called with (bytes hashed, bytes to hash).

        Raises:
            BundleError: not a bundle, another schema, or missing, changed or escaping files.
        """
        root = Path(path)
        bundle = cls._parsed(root, _manifest(root))
        missing = [
            f"{name}: not listed" for name in bundle.required_files() if name not in bundle.files
        ]
        if contents and not missing:
            bundle.check(progress=progress)
        else:
            bundle._refuse(missing + bundle._misplaced(bundle.files))
        return bundle

    @classmethod
    def _parsed(cls, root: Path, data: dict[str, Any]) -> Bundle:
        try:
            with at_path("requires"):
                needed = decode(frozenset[str], data.get("requires", []))
            if not needed <= FEATURES:
                raise BundleError(
                    f"bundle '{root}' needs a newer version of twotower",
                    found=f"it requires {', '.join(sorted(needed - FEATURES))}; this version knows "
                    f"{', '.join(sorted(FEATURES))}",
                    do="`pip install --upgrade twotower`, or export the checkpoint with this "
                    "version",
                )
            with at_path("generation"):
                settings = decode(dict[str, Any], data.get("generation"))
            bundle = decode(cls, {**data, **settings}, strict=False, path=root)
            if bundle.quantization is not None:
                with at_path("quantization"):
                    decode(_Quantization, bundle.quantization, strict=False)
        except RecordError as e:
            raise BundleError(
                f"{root / MANIFEST_FILE} is not complete",
                found=str(e),
                do="copy or export the bundle again",
            ) from e
        if data.get("signatures") != encode(bundle.signatures):
            raise BundleError(
                f"bundle '{root}' has other graph inputs or outputs than this version expects",
                found="the stored signatures differ from the contract",
                do="export the checkpoint again with this version of twotower",
            )
        return bundle

    def check(self, *, weights: bool = True, progress: Progress | None = None) -> None:
        """Compares the content of files with their SHA-256, once; see `check_files`.

        Without `weights` data files are left out, for a reader that is about to read every byte
        itself. `progress` is called with (bytes hashed, bytes to hash).

        Raises:
            BundleError: a file is missing, changed, or leads out of the folder.
        """
        hashed = {
            name: record
            for name, record in self.files.items()
            if weights or not name.endswith(DATA_SUFFIX)
        }
        rest = {name: record for name, record in self.files.items() if name not in hashed}
        self._refuse(check_files(self.path, hashed, progress) + self._misplaced(rest))

    def _misplaced(self, files: Mapping[str, FileRecord]) -> list[str]:
        """Files that are not there, or of another size."""
        return [
            f"{name}: missing or of another size"
            for name, record in files.items()
            if (file := inside(self.path, name)) is None
            or not file.is_file()
            or file.stat().st_size != record.size
        ]

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
            raise BundleError(
                f"bundle '{self.path}' is damaged: {len(problems)} file(s) are not what "
                "bundle.json says",
                found="; ".join(problems[:20] + more),
                do="copy the bundle again from where it was made, or export the checkpoint again",
            )

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer, if the checkpoint came with one."""
        if TOKENIZER_FILE not in self.files:
            return None
        return self.path / TOKENIZER_FILE

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The formats of its quantized weights; empty for a float bundle."""
        return tuple(FORMATS[name] for name in (self.quantization or {}).get("formats", ()))

    @property
    def max_context(self) -> int:
        """Longest text, prompt and answer together, the model was made for."""
        return self.config.max_position_embeddings

    def graph_file(self, name: str) -> Path:
        """The ONNX file of `context`, `context_head` or `denoiser`."""
        return self.path / GRAPH_FILES[name]

    @property
    def has_weights(self) -> bool:
        """Whether it holds weights: one of graphs alone can be built for and not run."""
        return "no-weights" not in self.requires

    def required_files(self) -> list[str]:
        """Files every bundle of this kind lists, but for the tokenizer."""
        suffixes = ("", TABLE_SUFFIX, DATA_SUFFIX) if self.has_weights else ("", TABLE_SUFFIX)
        return [graph + suffix for graph in GRAPH_FILES.values() for suffix in suffixes]

    def require_weights(self, what: str) -> None:
        """Refuses (BundleError) a bundle of graphs alone; `what` says what needs weights."""
        if not self.has_weights:
            raise BundleError(
                f"{what} needs weights, and bundle '{self.path}' holds none",
                found="it was made from a config.json alone (`requires` lists no-weights); engines "
                "can be built from it",
                do="export a checkpoint with `twotower export CHECKPOINT -o BUNDLE`; engines of "
                "the same shapes are taken from the cache",
            )

    def weights(self, name: str) -> Mapping[str, WeightRef]:
        """Every weight of a graph with its place in the data file, in the file's order.

        Raises:
            BundleError: the table cannot be read, or the data file is shorter than it says.
        """
        relative = GRAPH_FILES[name]
        data = self.files.get(relative + DATA_SUFFIX)
        if data is None:  # of a bundle without weights: any size will do
            return read_weight_table(self.path / (relative + TABLE_SUFFIX), 1 << 62)
        return read_weight_table(self.path / (relative + TABLE_SUFFIX), data.size)

    def data_file(self, name: str) -> Path:
        """The file a graph's weights lie in."""
        return self.path / (GRAPH_FILES[name] + DATA_SUFFIX)

    def program_identity(self, name: str) -> str:
        """SHA-256 of a graph without its weights: equal for checkpoints of one shape and dtype."""
        return self.files[GRAPH_FILES[name]].sha256

    def data_identity(self, name: str) -> str:
        """SHA-256 of a graph's weights; empty where there are none."""
        data = self.files.get(GRAPH_FILES[name] + DATA_SUFFIX)
        return data.sha256 if data else ""

    def graph_identity(self, name: str) -> str:
        """SHA-256 of a graph and of its weights: what decides a text."""
        return f"{self.program_identity(name)}+{self.data_identity(name)}"


def _manifest(root: Path) -> dict[str, Any]:
    file = root / MANIFEST_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        found = "the folder has no bundle.json" if root.is_dir() else "no such folder"
        raise BundleError(
            f"'{root}' is not a bundle",
            found=found,
            do=f"make one with `twotower export CHECKPOINT -o {root}`, or name another folder",
        ) from e
    except ValueError as e:
        raise BundleError(
            f"{file} is not JSON", found=str(e), do="copy or export the bundle again"
        ) from e
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise BundleError(
            f"bundle '{root}' has a schema this version cannot read",
            found=f"schema {schema!r}; this version reads schema {SCHEMA}",
            do=_newer_or_older(data, root, schema),
        )
    return dict(data)


def _newer_or_older(data: Any, root: Path, schema: Any) -> str:
    """The command that mends a bundle of another schema."""
    if isinstance(schema, int) and schema > SCHEMA:
        return "`pip install --upgrade twotower`, or export the checkpoint with this version"
    facts = data if isinstance(data, dict) else {}
    source, quantized = facts.get("source"), facts.get("quantization")
    name = again = ""
    if isinstance(source, dict) and "name" in source:
        name = f" (it was exported from {source['name']!r})"
    if isinstance(quantized, dict):
        recipe = quantized.get("recipe", {}).get("name", "RECIPE")
        again = f", `twotower quantize NEW --recipe {recipe} -o QUANTIZED`"
    return (
        f"`twotower export CHECKPOINT -o NEW` with this version{name}{again}, then "
        "`twotower build`; or use the old version"
    )


def derive_bundle(
    bundle: Bundle,
    output: Path,
    *,
    presets: Mapping[str, GenerationConfig],
    default: str,
    reports: Mapping[str, Any] | None = None,
) -> Bundle:
    """A bundle that differs in its presets and defaults only; its engines come along.

    Files are hard links where the file system allows it (a bundle's files are never changed in
    place). `default` names the preset that becomes the default; `reports` are JSON reports to
    store, by name.

    Raises:
        BundleError: the folder exists, or cannot be written.
    """
    require_new(output, error=BundleError)
    manifest = json.loads((bundle.path / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest["generation"]["presets"] = encode(presets)
    manifest["generation"]["defaults"] = presets[default].to_json()
    try:
        with unpublished(output) as folder:
            for source in sorted(p for p in bundle.path.rglob("*") if p.is_file()):
                relative = source.relative_to(bundle.path)
                # Locks, the cache, half-built engines and failed graphs stay with the original.
                hidden = any(part.startswith(".") for part in relative.parts)
                stays = relative.parts[0] == "engines" and hidden
                if relative.as_posix() != MANIFEST_FILE and not stays:
                    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                    link_file(source, folder / relative)
            for name, report in (reports or {}).items():
                file = folder / "reports" / f"{name}.json"
                file.unlink(missing_ok=True)  # a link to the original's must not be written through
                write_json(file, report)
            write_json(folder / MANIFEST_FILE, manifest)
    except OSError as e:
        raise BundleError(
            f"the bundle '{output}' could not be written",
            found=str(e),
            do="free disk space or check permissions; nothing was left behind",
        ) from e
    return Bundle.open(output, contents=False)


def note_measurement(bundle: Bundle, measured: Mapping[str, Any]) -> None:
    """Notes in the manifest what was measured of a bundle, in place of an earlier measurement.

    BundleError if the bundle is not quantized, or cannot be written.
    """
    if bundle.quantization is None:
        raise BundleError(
            f"bundle '{bundle.path}' is not quantized",
            found="no recipe in its manifest",
            do="measure a quantized bundle",
        )
    file = bundle.path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        manifest["quantization"]["measured"] = dict(measured)
        write_json(file, manifest)
    except OSError as e:
        raise BundleError(
            f"cannot note the measurement in {file}",
            found=str(e),
            do="make the folder writable, or pass --no-note to measure only",
        ) from e


def flags_of_bundle(bundle: Bundle) -> list[str]:
    """Warnings of a quantized bundle that was measured and is not inside its quality budget."""
    measured = (bundle.quantization or {}).get("measured")
    if not measured:
        return []
    return [str(flag) for flag in measured["flags"]]
