"""Reading `bundle.json`: schema, model, defaults, and whether every file it lists is there and unchanged."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bundle.integrity import FileRecord, Progress, check_files, inside
from twotower.config import GenerationConfig, ModelConfig
from twotower.config.formats import FORMATS, WeightFormat
from twotower.errors import BundleError, ConfigError
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TowerSignature, signatures

__all__ = ["DATA_SUFFIX", "GRAPH_FILES", "MANIFEST_FILE", "REPORT_FILE", "SCHEMA", "TOKENIZER_FILE", "Bundle", "is_bundle", "write_json"]

SCHEMA = 1
MANIFEST_FILE = "bundle.json"
TOKENIZER_FILE = "tokenizer/tokenizer.json"
REPORT_FILE = "reports/export.json"
GRAPH_FILES = {CONTEXT: "context/model.onnx", CONTEXT_HEAD: "context/head.onnx", DENOISER: "denoiser/model.onnx"}
DATA_SUFFIX = ".data"
"""A graph's weights lie beside it under the graph's name plus this."""


def is_bundle(path: Path) -> bool:
    """Whether a folder says it is a bundle (it may still be damaged)."""
    return (path / MANIFEST_FILE).is_file()


def write_json(path: Path, data: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


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
        quantization: Of a quantized bundle: recipe, options, identity of the bundle it was made from, and what was measured of it. None
            for a float bundle.
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

    @classmethod
    def open(cls, path: str | Path, *, contents: bool = True, progress: Progress | None = None) -> Bundle:
        """Opens a bundle and checks its files.

        Args:
            path: The folder.
            contents: Also compare SHA-256 (once; see `check_files`); without it sizes alone are checked.
            progress: Called with (bytes hashed, bytes to hash).

        Raises:
            BundleError: not a bundle, another schema, or missing, changed or escaping files.
        """
        root = Path(path)
        bundle = _parsed(root, _manifest(root))
        problems = [f"{name}: not listed" for name in GRAPH_FILES.values() if name not in bundle.files]
        if contents:
            problems += check_files(root, bundle.files, progress)
        else:
            problems += [
                f"{name}: missing or of another size"
                for name, record in bundle.files.items()
                if (file := inside(root, name)) is None or not file.is_file() or file.stat().st_size != record.size
            ]
        if problems:
            raise BundleError(
                f"bundle '{path}' is damaged: {len(problems)} file(s) are not what bundle.json says",
                found="; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else ""),
                do="copy the bundle again from where it was made, or export the checkpoint again",
            )
        return bundle

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

    def graph_identity(self, name: str) -> str:
        """SHA-256 of a graph and of its weights: what an engine is built from."""
        relative = GRAPH_FILES[name]
        return f"{self.files[relative].sha256}+{self.files[relative + DATA_SUFFIX].sha256}"


def _manifest(root: Path) -> dict[str, Any]:
    file = root / MANIFEST_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        found = "the folder has no bundle.json" if root.is_dir() else "no such folder"
        raise BundleError(
            f"'{root}' is not a bundle", found=found, do=f"make one with `twotower export CHECKPOINT -o {root}`, or name another folder"
        ) from e
    except ValueError as e:
        raise BundleError(f"{file} is not JSON", found=str(e), do="copy or export the bundle again") from e
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise BundleError(
            f"bundle '{root}' has a schema this version cannot read",
            found=f"schema {schema!r}; this version reads schema {SCHEMA}",
            do="export the checkpoint again with this version of twotower, or use the version that wrote it",
        )
    return dict(data)


def _quantization(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a manifest says of few bits, with what everybody reads of it there.

    Raises:
        KeyError, TypeError: it is not complete, or names a format of another version.
    """
    if not data:
        return None
    for name in data["formats"]:
        FORMATS[name]
    return {**data, "recipe": {"name": str(data["recipe"]["name"]), **data["recipe"]}, "measured": data["measured"]}


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
            presets={str(k): GenerationConfig.from_mapping(v) for k, v in data["generation"].get("presets", {}).items()},
            source=dict(data["source"]),
            files={str(k): FileRecord(int(v["size"]), str(v["sha256"])) for k, v in data["files"].items()},
            tools=dict(data["tools"]),
            signatures=all_signatures,
            quantization=_quantization(data.get("quantization")),
        )
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BundleError(
            f"{root / MANIFEST_FILE} is not complete", found=f"{type(e).__name__}: {e}", do="copy or export the bundle again"
        ) from e
