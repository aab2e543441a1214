"""What callers may pass as prompts, and the checks of a request before any work is done for it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import ConfigError, RequestError
from twotower.runtime.rows import Row
from twotower.runtime.tokenizer import Tokenizer, tokenizer_missing
from twotower.spec import MAX_CHUNK

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with options of its own.

    Attributes:
        prompt: Text, or token ids; empty for the beginning of a text (the BOS token).
    """

    prompt: Prompt
    config: GenerationConfig | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session can serve.

    Attributes:
        trained_block_size: Largest block size that needs no override.
        max_chunk: Most prompt tokens read in one pass.
        fixed_block: The only block size its denoiser computes; None for any.
    """

    model: ModelConfig
    tokenizer: Tokenizer | None
    trained_block_size: int
    max_context: int
    max_batch: int
    max_chunk: int
    fixed_block: int | None


def as_requests(prompts: Any, config: GenerationConfig) -> tuple[list[Request], bool]:
    """Requests from one prompt or a list of them.

    A flat sequence of whole numbers is one prompt; an empty one is no prompt at all.

    Returns:
        The requests, each with its options, and whether a single one was passed.

    Raises:
        RequestError: something else was passed.
    """
    single = isinstance(prompts, (str, Request)) or (
        _is_sequence(prompts) and len(prompts) > 0 and _is_whole(prompts[0])
    )
    if not single and not _is_sequence(prompts):
        raise _not_a_prompt(prompts)
    out = []
    for item in [prompts] if single else prompts:
        request = item if isinstance(item, Request) else Request(item)
        if not isinstance(request.prompt, str) and not _is_sequence(request.prompt):
            raise _not_a_prompt(request.prompt)
        out.append(Request(request.prompt, request.config or config))
    return out, single


def row_from_request(index: int, request: Request, limits: Limits) -> Row:
    """The request ready to run.

    Any token of the vocabulary may be in a prompt, the mask token too: it means something to the
    denoiser only, which never sees prompts.

    Raises:
        RequestError: a token is out of range, text is needed without a tokenizer, or the text would
            be too long.
        ConfigError: the block size is not one the denoiser can work with.
    """
    config = request.config
    assert config is not None
    if config.mode != "ar":
        _check_block_size(config, limits)
    if config.stop and limits.tokenizer is None:
        raise tokenizer_missing(f"a stop string ({config.stop[0]!r})")
    prompt = token_ids(request.prompt, limits) or [limits.model.bos_token_id]
    check_vocabulary(prompt, f"prompt {index}", limits)
    room = limits.max_context - len(prompt)
    if config.max_new_tokens > room:
        shorter = f"lower max_new_tokens to {room} or less" if room > 0 else "shorten the prompt"
        raise RequestError(
            f"prompt {index} is too long: {len(prompt)} tokens, and {config.max_new_tokens} new "
            "ones asked for",
            found=f"this session holds {limits.max_context} tokens a text, prompt and answer "
            "together",
            do=f"{shorter}, or open the session with a larger max_context (--max-context; "
            "TensorRT engines are built with one)",
        )
    return Row(index, prompt, config, model=limits.model, tokenizer=limits.tokenizer)


def batches(rows: Sequence[Row], max_batch: int) -> Iterator[list[Row]]:
    """Rows that can run together, in the order of their first.

    They share mode and block size; in mode `auto` also threshold and steps, since their common
    passes decide the mode.
    """
    groups: dict[tuple[str | float, ...], list[Row]] = {}
    for row in rows:
        config = row.config
        auto = config.mode == "auto"
        setting = (config.confidence_threshold, config.steps_per_block) if auto else ()
        groups.setdefault((config.mode, row.width, *setting), []).append(row)
    for group in groups.values():
        for start in range(0, len(group), max_batch):
            yield group[start : start + max_batch]


def _check_block_size(config: GenerationConfig, limits: Limits) -> None:
    size, trained = config.block_size, limits.trained_block_size
    if size > trained and not config.allow_untrained_block_size:
        raise ConfigError(
            f"block_size={size} is above the {trained} this denoiser was trained with",
            found="quality collapses there without any other sign: HumanEval falls from 76.4 to "
            "19.9 at a block size of 64",
            do=f"use block_size {trained} or less, or set allow_untrained_block_size=True "
            "(--allow-untrained-block-size)",
        )
    if limits.fixed_block is not None and size != limits.fixed_block:
        raise ConfigError(
            f"block_size={size} cannot be used with these engines",
            found=f"they were built for blocks of {limits.fixed_block}",
            do=f"use block_size {limits.fixed_block}, or ort-cpu, which takes any",
        )
    if size > MAX_CHUNK:
        raise ConfigError(
            f"block_size={size} cannot be used",
            found=f"the context tower reads at most {MAX_CHUNK} tokens at once",
            do=f"use a block size of {MAX_CHUNK} or less",
        )


def check_vocabulary(tokens: Sequence[int], where: str, limits: Limits) -> None:
    """Refuses, by RequestError, ids outside the vocabulary; `where` names them."""
    vocab = limits.model.vocab_size
    for i, token in enumerate(tokens):
        if not 0 <= token < vocab:
            raise RequestError(
                f"{where} has a token id outside the vocabulary",
                found=f"{token} at position {i}; allowed: 0 to {vocab - 1}",
                do="use the tokenizer the model was trained with",
            )


def token_ids(prompt: Prompt, limits: Limits) -> list[int]:
    """Token ids of a prompt; RequestError for text without tokenizer, or other types."""
    if isinstance(prompt, str):
        if limits.tokenizer is None:
            raise tokenizer_missing("a prompt given as text")
        return limits.tokenizer.encode(prompt)
    if not _is_sequence(prompt):
        raise _not_a_prompt(prompt)
    for token in prompt:
        if not _is_whole(token):
            raise RequestError(
                f"a prompt holds {token!r}",
                found=f"a {type(token).__name__} among token ids",
                do="pass whole numbers only",
            )
    return [operator.index(t) for t in prompt]


def _is_sequence(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _not_a_prompt(value: object) -> RequestError:
    return RequestError(
        f"a {type(value).__name__} is not a prompt",
        found=repr(value)[:80],
        do="pass text, a list of token ids, a Request, or a list of these",
    )
