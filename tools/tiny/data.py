"""Batches of both stages; a step has the same batch on every run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from recipe import RECIPE
from tasks import draw
from tokenizers import Tokenizer
from vocabulary import EOS, PAD, make_tokenizer

__all__ = ["Blocks", "Sequences", "block_batch", "sequence_batch"]


@dataclass(frozen=True, slots=True)
class Sequences:
    """Tokens [B,L] int64 and what each is worth as a target [B,L] float32."""

    tokens: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Prompts [B,L] with their lengths [B]; answers in blocks [B,N,S], end-of-sequence after their end; which blocks are used [B,N]."""

    prompts: torch.Tensor
    prompt_lengths: torch.Tensor
    blocks: torch.Tensor
    used: torch.Tensor
    threshold: float
    seed: int


def sequence_batch(rng: random.Random, *, every_kind: bool) -> list[Sequences]:
    """Whole texts for the context tower, in groups of like length: padding costs as much as text."""
    kinds: Sequence[str | None] = (
        [None] * RECIPE.context_rows if every_kind else _kinds(rng, RECIPE.context_rows)
    )
    pairs = sorted(_pairs(rng, kinds), key=lambda pair: len(pair[0]) + len(pair[1]))
    size = RECIPE.context_rows // RECIPE.groups
    return [_sequences(pairs[i : i + size]) for i in range(0, len(pairs), size)]


def _sequences(pairs: list[tuple[list[int], list[int]]]) -> Sequences:
    length = max(len(p) + len(a) for p, a in pairs)
    tokens = torch.full((len(pairs), length), PAD)
    weight = torch.zeros(len(pairs), length)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        weight[i, : len(prompt)] = RECIPE.prompt_weight
        weight[i, len(prompt) : end] = 1.0
    return Sequences(tokens, weight)


def block_batch(rng: random.Random) -> Blocks:
    """Prompts and answers cut into blocks, as a generation meets them."""
    pairs, size = _pairs(rng, _kinds(rng, RECIPE.denoiser_rows)), RECIPE.block
    counts = [-(-len(a) // size) for _, a in pairs]
    prompts = torch.full((len(pairs), max(len(p) for p, _ in pairs)), PAD)
    blocks = torch.full((len(pairs), max(counts) * size), EOS)
    for i, (prompt, answer) in enumerate(pairs):
        prompts[i, : len(prompt)] = torch.tensor(prompt)
        blocks[i, : len(answer)] = torch.tensor(answer)
    used = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    lengths = torch.tensor([len(p) for p, _ in pairs])
    return Blocks(
        prompts,
        lengths,
        blocks.view(len(pairs), -1, size),
        used,
        rng.uniform(0.5, 0.95),
        rng.getrandbits(62),
    )


def _kinds(rng: random.Random, rows: int) -> list[str]:
    return rng.choices(list(RECIPE.kinds), list(RECIPE.kinds.values()), k=rows)


def _pairs(rng: random.Random, kinds: Sequence[str | None]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer (with its end) in tokens, of these kinds (None for any); one problem in eight has a solved one in front."""
    tokenizer, out = _tokenizer(), []
    for kind in kinds:
        problem = draw(rng, held_out=False, kind=kind, shots=int(rng.random() < 1 / 8))
        prompt = tokenizer.encode(problem.prompt).ids
        whole = tokenizer.encode(problem.text).ids
        assert whole[: len(prompt)] == prompt, problem
        out.append((prompt, [*whole[len(prompt) :], EOS]))
    return out


@cache
def _tokenizer() -> Tokenizer:
    return make_tokenizer()
