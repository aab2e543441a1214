"""Prompt files: one JSON object a line, each with options of its own if wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower.config import GenerationConfig
from twotower.errors import RequestError

_FORM = (
    'write {"text": "..."} or {"tokens": [5, 6, 7]}, with generation options beside it if wanted'
)


def read_prompts(path: Path, base: GenerationConfig) -> list[tuple[Any, GenerationConfig]]:
    """The prompts of a file, text or token ids, each with its options, set on top of `base`.

    Raises:
        RequestError: the file cannot be read, has no prompts, or a line is not one; names the line.
        ConfigError: a line's option cannot be honoured.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(
            f"cannot read the prompt file {path}",
            found=str(e),
            do="name a UTF-8 file with one JSON object a line",
        ) from e
    out = [
        _prompt_line(f"{path}, line {number}", line, base)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not out:
        raise RequestError(
            f"the prompt file {path} has no prompts",
            found=f"{len(lines)} lines",
            do='write one {"text": ...} a line',
        )
    return out


def _prompt_line(where: str, line: str, base: GenerationConfig) -> tuple[Any, GenerationConfig]:
    try:
        data = json.loads(line)
    except ValueError as e:
        raise RequestError(
            f"{where} is not JSON",
            found=str(e),
            do=_FORM,
        ) from e
    if not isinstance(data, dict) or ("text" in data) == ("tokens" in data):
        raise RequestError(
            f"{where} is not one prompt",
            found=line[:80],
            do=_FORM,
        )
    prompt = data.pop("text") if "text" in data else data.pop("tokens")
    ids = isinstance(prompt, list) and all(
        isinstance(t, int) and not isinstance(t, bool) for t in prompt
    )
    if not isinstance(prompt, str) and not ids:
        raise RequestError(
            f"{where}: the prompt is neither text nor a list of token ids",
            found=repr(prompt)[:80],
            do=_FORM,
        )
    return (prompt if isinstance(prompt, str) else tuple(prompt)), GenerationConfig.from_mapping(
        data, base=base
    )
