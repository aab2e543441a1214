"""A checkpoint's generation_config.json: block-diffusion options and end-of-text tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import ConfigError

_FILE = "generation_config.json"
_OPTIONS = ("block_size", "steps_per_block", "confidence_threshold", "max_new_tokens")


def read_defaults(folder: Path) -> GenerationConfig:
    """Generation defaults of a checkpoint, of fields that are about block diffusion.

    ConfigError if the file is not a JSON object, or a value cannot be used.
    """
    data = _read(folder)
    return GenerationConfig.from_mapping({k: data[k] for k in _OPTIONS if k in data})


def read_eos_token_ids(folder: Path, model: ModelConfig) -> tuple[int, ...]:
    """Tokens that end a text: `eos_token_id`, a number or a list, as transformers takes it.

    Where the file or the field is missing or null, those of config.json (`model`) count.

    Raises:
        ConfigError: the file is no JSON object, or the field is not tokens of the vocabulary.
    """
    value = _read(folder).get("eos_token_id")
    if value is None:
        return model.eos_token_ids
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(i) is not int or not 0 <= i < model.vocab_size for i in ids):
        allowed = f"one whole number from 0 to {model.vocab_size - 1}, or a list of them"
        raise ConfigError(
            f"{folder / _FILE} names end-of-sequence tokens that cannot be used",
            found=f"eos_token_id={json.dumps(value)[:80]}; allowed: {allowed}",
            do="correct eos_token_id, or remove it for the one of config.json",
        )
    return tuple(dict.fromkeys(ids))


def _read(folder: Path) -> dict[str, Any]:
    """The file's fields; none where there is no file."""
    file = folder / _FILE
    if not file.is_file():
        return {}
    do = "correct the file or remove it"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"cannot read {file}",
            found=str(e),
            do=do,
        ) from e
    if not isinstance(data, dict):
        found = f"a {type(data).__name__}; expected a JSON object"
        raise ConfigError(f"cannot read {file}", found=found, do=do)
    return data
