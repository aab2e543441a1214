"""Block diffusion as its definition reads, one row in torch: the oracle of the shipped loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from twotower.config import GenerationConfig
from twotower.model import ContextTower, DenoiserTower, empty_state
from twotower.model.denoiser_tower import commit_step
from twotower.spec import candidate_count


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """One pass: the block before it, predictions and their confidences, S each."""

    block_in: list[int]
    predicted: list[int]
    confidence: list[float]


@dataclass(slots=True)
class ReferenceText:
    """What was generated (end-of-sequence tokens have no effect here) and every denoiser pass."""

    tokens: list[int] = field(default_factory=list)
    steps: list[ReferenceStep] = field(default_factory=list)


def reference_generate(
    towers: tuple[ContextTower, DenoiserTower],
    prompt: list[int],
    options: GenerationConfig,
) -> ReferenceText:
    """Greedy generation of one text of exactly `max_new_tokens`, in either mode."""
    context, denoiser = towers
    capacity = len(prompt) + options.max_new_tokens + options.block_size
    state = empty_state(context.config, 1, capacity)
    hidden, state = context.extend(
        torch.tensor([prompt]),
        state,
        past=torch.tensor([0]),
    )
    out = ReferenceText()
    while len(out.tokens) < options.max_new_tokens:
        past = torch.tensor([len(prompt) + len(out.tokens)])
        if options.mode == "ar":
            new = [int(context.logits(hidden[0, -1]).argmax())]
        else:
            block = torch.full((1, options.block_size), context.config.mask_token_id)
            for step in range(options.steps_per_block):
                masked = int((block == context.config.mask_token_id).sum())
                if not masked:
                    break
                logits = denoiser.logits(block, state, context_length=past)
                floor = -(-masked // (options.steps_per_block - step))
                done = commit_step(
                    logits,
                    block,
                    context.config,
                    threshold=torch.tensor([options.confidence_threshold]),
                    commit_floor=torch.tensor([floor]),
                    temperature=torch.zeros(1),
                    noise=torch.zeros(1, options.block_size, candidate_count(context.config)),
                )
                predicted, confidence = done.predicted[0].tolist(), done.confidence[0].tolist()
                out.steps.append(ReferenceStep(block[0].tolist(), predicted, confidence))
                block = done.next_block
            new = block[0].tolist()
        out.tokens += new
        hidden, state = context.extend(
            torch.tensor([new]),
            state,
            past=past,
        )
    out.tokens = out.tokens[: options.max_new_tokens]
    return out
