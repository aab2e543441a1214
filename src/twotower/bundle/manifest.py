"""Reading `bundle.json`: schema, model, defaults, and whether every file it lists is there and unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bundle.integrity import check_files
from twotower.config import GenerationConfig, ModelConfig
from twotower.config.formats import FORMATS, WeightFormat
from twotower.errors import BundleError, ConfigError
from twotower.files import FileRecord, Progress, inside, write_atomically
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TowerSignature, signatures
from twotower.weights.refs import WeightRef
from twotower.weights.table import TABLE_SUFFIX, read_weight_table

__all__ = [
    "DATA_SUFFIX",
    "FEATURES",
    "GRAPH_FILES",
    "MANIFEST_FILE",
    "REPORT_FILE",
    "SCHEMA",
    "TOKENIZER_FILE",
    "Bundle",
    "is_bundle",
    "write_json",
]

SCHEMA = 2
FEATURES = frozenset({"no-weights", "quantization"})
"""What a reader may be required to know: `no-weights` marks a bundle of graphs alone, `quantization` one with weights in few bits. A bundle
lists in `requires` what it cannot be read without; any other field a reader does not know is left
alone.
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
class Bundle:
    """An opened and checked bundle.

    Attributes:
        path: The folder.
        config: The model.
        dtype: Element type of weights and residual stream in its graphs.
        precision: Element type of every part of the towers, by name.
        trained_block_size: S the denoiser was trained with.
        defaults: Generation defaults.
        presets: Named settings found by `twotower tune`; empty in a bundle fresh from an export.
        source: Where it was exported from: name, and size and SHA-256 of every shard.
        files: Every file the manifest answers for.
        tools: Versions of what wrote it.
        quantization: Of a quantized bundle: recipe, options, identity of the bundle it was made
            from, and what was measured of it. None for a float bundle.
        requires: Features a reader must know, of `FEATURES`.
    """

    path: Path
    config: ModelConfig
    dtype: str
    precision: dict[str, str]
    trained_block_size: int
    defaults: GenerationConfig
    presets: dict[str, GenerationConfig]
    source: dict[str, Any]
    files: dict[str, FileRecord]
    tools: dict[str, str]
    signatures: dict[str, TowerSignature] = field(repr=False)
    quantization: dict[str, Any] | None = None
    requires: frozenset[str] = frozenset()

    @classmethod
    def open(
        cls, path: str | Path, *, contents: bool = True, progress: Progress | None = None
    ) -> Bundle:
        """Opens a bundle and checks its files.

        Args:
            path: The folder.
            contents: Also compare SHA-256 (once; see `check_files`); without it sizes alone are
                checked.
            progress: Called with (bytes hashed, bytes to hash).

        Raises:
            BundleError: not a bundle, another schema, or missing, changed or escaping files.
        """
        root = Path(path)
        bundle = _parsed(root, _manifest(root))
        missing = [
            f"{name}: not listed" for name in bundle.required_files() if name not in bundle.files
        ]
        if contents and not missing:
            bundle.check(progress=progress)
        else:
            bundle._refuse(missing + bundle._misplaced(bundle.files))
        return bundle

    def check(self, *, weights: bool = True, progress: Progress | None = None) -> None:
        """Compares the content of files with their SHA-256, once; see `check_files`.

        Args:
            weights: Of data files too; False for a reader that is about to read every byte of them
                itself.
            progress: Called with (bytes hashed, bytes to hash).

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
            raise BundleError(
                f"bundle '{self.path}' is damaged: {len(problems)} file(s) are not what bundle.json says",
                found="; ".join(problems[:20])
                + (f"; and {len(problems) - 20} more" if len(problems) > 20 else ""),
                do="copy the bundle again from where it was made, or export the checkpoint again",
            )

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer, if the checkpoint came with one."""
        return self.path / TOKENIZER_FILE if TOKENIZER_FILE in self.files else None

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """The few-bit formats of its weights; empty for a float bundle."""
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
        """Refuses a bundle of graphs alone.

        Raises:
            BundleError: it holds no weights; `what` says what needs them.
        """
        if not self.has_weights:
            raise BundleError(
                f"{what} needs weights, and bundle '{self.path}' holds none",
                found="it was made from a config.json alone (`requires` lists no-weights); engines can be built from it",
                do="export a checkpoint with `twotower export CHECKPOINT -o BUNDLE`; engines of the same shapes are taken from the cache",
            )

    def weights(self, name: str) -> Mapping[str, WeightRef]:
        """Every weight of a graph with its place in the graph's data file, in the file's order.

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
        """SHA-256 of a graph without its weights: the same for every checkpoint of one shape and dtype."""
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
    requires = data.get("requires", [])
    if not isinstance(requires, list) or not all(isinstance(feature, str) for feature in requires):
        found = f"`requires` is {requires!r}; allowed: a list of names"
        raise BundleError(
            f"{file} is not complete", found=found, do="copy or export the bundle again"
        )
    unknown = sorted(set(requires) - FEATURES)
    if unknown:
        raise BundleError(
            f"bundle '{root}' needs a newer version of twotower",
            found=f"it requires {', '.join(unknown)}; this version knows {', '.join(sorted(FEATURES))}",
            do="`pip install --upgrade twotower`, or export the checkpoint with this version",
        )
    return dict(data)


def _newer_or_older(data: Any, root: Path, schema: Any) -> str:
    """The command that mends a bundle of another schema."""
    if isinstance(schema, int) and schema > SCHEMA:
        return "`pip install --upgrade twotower`, or export the checkpoint with this version"
    facts = data if isinstance(data, dict) else {}
    source, few = facts.get("source"), facts.get("quantization")
    name = (
        f" (it was exported from {source['name']!r})"
        if isinstance(source, dict) and "name" in source
        else ""
    )
    recipe = few.get("recipe", {}).get("name", "RECIPE") if isinstance(few, dict) else ""
    again = f", `twotower quantize NEW --recipe {recipe} -o QUANTIZED`" if recipe else ""
    return f"`twotower export CHECKPOINT -o NEW` with this version{name}{again}, then `twotower build`; or use the old version"


def _quantization(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a manifest says of few bits, with what everybody reads of it there.

    Raises:
        KeyError, TypeError: it is not complete, or names a format of another version.
    """
    if not data:
        return None
    for name in data["formats"]:
        FORMATS[name]
    return {
        **data,
        "recipe": {"name": str(data["recipe"]["name"]), **data["recipe"]},
        "measured": data["measured"],
    }


def _parsed(root: Path, data: dict[str, Any]) -> Bundle:
    try:
        config = ModelConfig.from_json(data["model"])
        dtype = str(data["dtype"])
        all_signatures = signatures(config, dtype)
        if data["signatures"] != {name: s.to_json() for name, s in all_signatures.items()}:
            raise BundleError(
                f"bundle '{root}' has other graph inputs or outputs than this version expects",
                found="the stored signatures differ from the contract",
                do="export the checkpoint again with this version of twotower",
            )
        return Bundle(
            path=root,
            config=config,
            dtype=dtype,
            precision=dict(data["precision"]),
            trained_block_size=int(data["generation"]["trained_block_size"]),
            defaults=GenerationConfig.from_mapping(data["generation"]["defaults"]),
            presets={
                str(k): GenerationConfig.from_mapping(v)
                for k, v in data["generation"].get("presets", {}).items()
            },
            source=dict(data["source"]),
            files={
                str(k): FileRecord(int(v["size"]), str(v["sha256"]))
                for k, v in data["files"].items()
            },
            tools=dict(data["tools"]),
            signatures=all_signatures,
            quantization=_quantization(data.get("quantization")),
            requires=frozenset(map(str, data.get("requires", ()))),
        )
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BundleError(
            f"{root / MANIFEST_FILE} is not complete",
            found=f"{type(e).__name__}: {e}",
            do="copy or export the bundle again",
        ) from e
