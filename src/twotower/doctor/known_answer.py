"""The known answer of a bundle: what one engine of it wrote for two fixed prompts, pass by pass, for every other engine to match."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.bundle import GRAPH_FILES, Bundle
from twotower.config import GenerationConfig, ModelConfig
from twotower.files import write_atomically
from twotower.runtime import Request, StepRecord, TwoTower

__all__ = [
    "ANSWER_FILE",
    "Answer",
    "KnownAnswer",
    "Pass",
    "answers_of",
    "compute_answer",
    "diffusion_options",
    "known_prompts",
    "read_answer",
    "tokens_in_company",
    "write_answer",
]

ANSWER_FILE = Path("engines") / "known-answer.json"
"""In the bundle, beside the engines: it is no part of what was exported, and it travels to a machine that cannot compute it."""

SCHEMA = 1
_NEW_TOKENS, _AR_TOKENS = 48, 24
_SHORT, _LONG = (
    9,
    240,
)  # the long text crosses position 256, where the first bucket of the cache ends


@dataclass(frozen=True, slots=True)
class Pass:
    """One denoiser pass over one row, S values each."""

    block_in: tuple[int, ...]
    predicted: tuple[int, ...]
    confidence: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt was answered with.

    Attributes:
        tokens: By diffusion.
        passes: The denoiser's passes that led to them.
        ar_tokens: By autoregression.
        logprobs: Log-probability of each of those.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    passes: tuple[Pass, ...]
    ar_tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """Answers to a short prompt and to one whose text outgrows the first bucket of the cache.

    Attributes:
        graphs: Identity of every graph they were computed from.
        made_by: The target that computed them.
    """

    graphs: dict[str, str]
    made_by: str
    short: Answer
    long: Answer


def known_prompts(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The two prompts, the same for every bundle with this vocabulary and these texts lengths."""
    rng = np.random.default_rng(20)
    words = np.setdiff1d(
        np.arange(config.vocab_size),
        [config.mask_token_id, config.pad_token_id, *config.eos_token_ids],
    )
    longest = min(_LONG, config.max_position_embeddings - _NEW_TOKENS)
    return tuple(rng.choice(words, _SHORT).tolist()), tuple(rng.choice(words, longest).tolist())


def answers_of(model: TwoTower, prompt: Sequence[int], given: Answer | None = None) -> Answer:
    """Lets a model answer one prompt alone.

    Args:
        model: An opened bundle.
        prompt: Token ids.
        given: An answer whose autoregressive tokens are scored in place of the model's own, so that
            the numbers can be compared.
    """
    steps: list[StepRecord] = []
    out = model.generate(list(prompt), diffusion_options(), on_step=steps.append)
    ar = model.generate(
        list(prompt), GenerationConfig(mode="ar", max_new_tokens=_AR_TOKENS, ignore_eos=True)
    )
    score = model.score((list(prompt), list(given.ar_tokens if given else ar.tokens)))
    passes = tuple(
        Pass(*(tuple(a[0].tolist()) for a in (s.block_in, s.predicted, s.confidence)))
        for s in steps
    )
    return Answer(tuple(prompt), tuple(out.tokens), passes, tuple(ar.tokens), tuple(score.logprobs))


def diffusion_options() -> GenerationConfig:
    """How the known prompts are answered: a threshold that a sound model passes more than once a pass."""
    return GenerationConfig(max_new_tokens=_NEW_TOKENS, confidence_threshold=0.8, ignore_eos=True)


def tokens_in_company(model: TwoTower, prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The first prompt's tokens when all are answered in one batch."""
    return tuple(
        model.generate([Request(tuple(p), diffusion_options()) for p in prompts])[0].tokens
    )


def compute_answer(bundle: Bundle, model: TwoTower) -> KnownAnswer:
    """The known answer as this engine computes it."""
    short, long = known_prompts(model.config)
    graphs = {name: bundle.graph_identity(name) for name in GRAPH_FILES}
    return KnownAnswer(graphs, model.target, answers_of(model, short), answers_of(model, long))


def read_answer(bundle: Bundle) -> KnownAnswer | None:
    """The answer kept with a bundle; None if there is none, it is of other graphs, or it cannot be read."""
    try:
        data = json.loads((bundle.path / ANSWER_FILE).read_text(encoding="utf-8"))
        answer = KnownAnswer(
            dict(data["graphs"]),
            str(data["made_by"]),
            _answer(data["short"]),
            _answer(data["long"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    fits = data.get("schema") == SCHEMA and answer.graphs == {
        name: bundle.graph_identity(name) for name in GRAPH_FILES
    }
    same = (answer.short.prompt, answer.long.prompt) == known_prompts(bundle.config)
    return answer if fits and same else None


def write_answer(bundle: Bundle, answer: KnownAnswer) -> bool:
    """Keeps an answer with its bundle; False where the folder cannot be written."""
    try:
        write_atomically(
            bundle.path / ANSWER_FILE, json.dumps({"schema": SCHEMA, **asdict(answer)}) + "\n"
        )
    except OSError:
        return False
    return True


def _answer(data: dict[str, Any]) -> Answer:
    def whole(values: list[Any]) -> tuple[int, ...]:
        return tuple(int(v) for v in values)

    def real(values: list[Any]) -> tuple[float, ...]:
        return tuple(float(v) for v in values)

    passes = tuple(
        Pass(whole(p["block_in"]), whole(p["predicted"]), real(p["confidence"]))
        for p in data["passes"]
    )
    return Answer(
        whole(data["prompt"]),
        whole(data["tokens"]),
        passes,
        whole(data["ar_tokens"]),
        real(data["logprobs"]),
    )
