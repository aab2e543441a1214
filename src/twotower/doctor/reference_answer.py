"""The reference answer of a bundle: what its `ort-cpu` engine wrote, for other engines to match.

It is the answer to two fixed prompts, pass by pass, and is stored in the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower.bundle import GRAPH_FILES, Bundle
from twotower.config import GenerationConfig, ModelConfig
from twotower.doctor.checks import DIFFUSION, CheckResult, first_difference, ordinary_tokens
from twotower.errors import EngineMismatchError, EngineOutputError
from twotower.files import write_atomically
from twotower.records import decode, encode
from twotower.runtime import Request, StepRecord, TwoTower

REFERENCE_TARGET = "ort-cpu"
"""Its graphs were compared with torch, and it computes in float32."""

ANSWER_FILE = Path("engines") / "known-answer.json"
"""In the bundle, beside the engines: it is no part of what was exported, and it travels along."""

KNOWN_ISSUES = "docs/known-issues.md"
"""A page with a section for each way in which engines are wrong."""

TOLERANCE = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.12}
"""The largest error (see `Comparison`) that rounding explains, by the engine's element type.

float32 has room for another order of summation and not for TF32, whose products keep ten bits. The
others have twice what rounding every result costs the models of this repository at worst (0.015 and
0.058, by tools.half_precision); one wrong token in a short prompt costs 0.11 to 0.27.
An engine that is wrong in a few places only is not found by this, but by its tokens in float32.
"""

SCHEMA = 1
_CHECK = "reference answer"
_AUTOREGRESSIVE = GenerationConfig(mode="ar", max_new_tokens=24, ignore_eos=True)
_SHORT = 9
_LONG = 240
"""Tokens of the long prompt: its text crosses position 256, where the cache's first bucket ends."""

Opener = Callable[[], AbstractContextManager[TwoTower]]
"""Opens a bundle's engines; they are closed when the `with` statement ends."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One denoiser pass over one row, S values each."""

    block_in: tuple[int, ...]
    predicted: tuple[int, ...]
    confidence: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt was answered with.

    `tokens` are by diffusion, from the denoiser's `passes`; `ar_tokens` by autoregression, each
    with its log-probability.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    passes: tuple[Pass, ...]
    ar_tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReferenceAnswer:
    """Answers to a short prompt and to one whose text outgrows the first bucket of the cache.

    `graphs` identifies every graph they were computed from, `made_by` the target.
    """

    graphs: dict[str, str]
    made_by: str
    short: Answer
    long: Answer


def reference_prompts(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The two prompts, the same for every bundle with this vocabulary and longest text."""
    rng = np.random.default_rng(20)
    words = ordinary_tokens(config)
    longest = min(_LONG, config.max_position_embeddings - DIFFUSION.max_new_tokens)
    return tuple(rng.choice(words, _SHORT).tolist()), tuple(rng.choice(words, longest).tolist())


def _answer(model: TwoTower, prompt: Sequence[int], reference: Answer | None = None) -> Answer:
    """Lets a model answer one prompt alone; with a reference it scores that one's tokens."""
    steps: list[StepRecord] = []
    out = model.generate(list(prompt), DIFFUSION, on_step=steps.append)
    ar = model.generate(list(prompt), _AUTOREGRESSIVE)
    score = model.score((list(prompt), list(reference.ar_tokens if reference else ar.tokens)))
    passes = tuple(
        Pass(
            tuple(s.block_in[0].tolist()),
            tuple(s.predicted[0].tolist()),
            tuple(s.confidence[0].tolist()),
        )
        for s in steps
    )
    return Answer(
        tuple(prompt),
        tuple(out.tokens),
        passes,
        tuple(ar.tokens),
        tuple(score.logprobs),
    )


def compute_answer(bundle: Bundle, model: TwoTower) -> ReferenceAnswer:
    """The reference answer as this engine computes it."""
    short, long = reference_prompts(model.config)
    graphs = {name: bundle.graph_identity(name) for name in GRAPH_FILES}
    return ReferenceAnswer(
        graphs,
        model.target,
        _answer(model, short),
        _answer(model, long),
    )


def reference_answer_of(
    bundle: Bundle, open_reference: Opener
) -> tuple[ReferenceAnswer | None, str]:
    """The answer stored in a bundle, or computed by its reference engine and stored.

    `open_reference` opens the `REFERENCE_TARGET` engines. Returns None where there are none, and
    where the answer comes from.
    """
    stored = read_answer(bundle)
    if stored is not None:
        return stored, f"stored in the bundle, computed by {stored.made_by}"
    try:
        with open_reference() as model:
            answer = compute_answer(bundle, model)
    except EngineMismatchError as e:
        build = f"twotower build {bundle.path} --target {REFERENCE_TARGET}"
        return None, f"{e.what}; run `{build}` and check again, on any machine"
    written = write_answer(bundle, answer)
    where = "stored in the bundle" if written else "not stored: the bundle cannot be written"
    return answer, f"computed by {answer.made_by} and {where}"


def read_answer(bundle: Bundle) -> ReferenceAnswer | None:
    """The answer stored in a bundle; None if there is none, or it is of other graphs or prompts."""
    try:
        data = json.loads((bundle.path / ANSWER_FILE).read_text(encoding="utf-8"))
        answer = decode(ReferenceAnswer, data, strict=False)
    except (OSError, ValueError):
        return None
    graphs = {name: bundle.graph_identity(name) for name in GRAPH_FILES}
    fits = data.get("schema") == SCHEMA and answer.graphs == graphs
    same = (answer.short.prompt, answer.long.prompt) == reference_prompts(bundle.config)
    return answer if fits and same else None


def write_answer(bundle: Bundle, answer: ReferenceAnswer) -> bool:
    """Stores an answer in its bundle; False where the folder cannot be written."""
    text = json.dumps({"schema": SCHEMA, **encode(answer)}) + "\n"
    try:
        write_atomically(bundle.path / ANSWER_FILE, text)
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Comparison:
    """One answer against the reference.

    `first` is the first token that differs, in either mode, None if all are equal; `error` the
    larger median difference of confidences or of log-probabilities in nats, over what was computed
    from the same tokens. `constant`: every confidence is zero, or the text is one token and the
    reference's is not.
    """

    first: int | None
    error: float
    finite: bool = True
    constant: bool = False

    def wrong(self, dtype: str) -> bool:
        """Whether rounding does not explain it: only in half precision may a close call differ."""
        explained = self.finite and not self.constant and self.error <= TOLERANCE[dtype]
        return not explained or (dtype == "float32" and self.first is not None)

    def described(self, dtype: str) -> str:
        """In words."""
        if not self.finite:
            return "not finite"
        if self.first is None:
            tokens = "same tokens"
        else:
            why = "" if self.wrong(dtype) else ", as rounding may"
            tokens = f"differs from token {self.first}{why}"
        return f"{tokens} (error {self.error:.1e}, allowed {TOLERANCE[dtype]:.0e})"


def compare(reference: Answer, got: Answer) -> Comparison:
    """Compares an answer with the reference, whose autoregressive tokens `got` must have scored.

    Errors are medians because a close call between two experts can go the other way by rounding
    alone, which puts one position far off. An engine that is wrong is wrong at most positions.
    """
    numbers = [c for p in got.passes for c in p.confidence] + list(got.logprobs)
    finite = bool(np.isfinite(numbers).all())
    firsts = (
        first_difference(reference.tokens, got.tokens),
        first_difference(reference.ar_tokens, got.ar_tokens),
    )
    errors: list[float] = []
    for want, have in zip(reference.passes, got.passes, strict=False):
        if want.block_in != have.block_in:
            break
        errors += np.abs(np.subtract(want.confidence, have.confidence)).tolist()
    nats = np.abs(np.subtract(reference.logprobs, got.logprobs))
    error = max(float(np.median(errors)) if errors else 0.0, float(np.median(nats)))
    zeros = bool(got.passes) and all(c == 0 for p in got.passes for c in p.confidence)
    one_token = len(set(got.tokens)) == 1 and len(set(reference.tokens)) > 1
    return Comparison(
        first=min((f for f in firsts if f is not None), default=None),
        error=error if finite else float("inf"),
        finite=finite,
        constant=zeros or one_token,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything seen of one engine.

    Attributes:
        dtype: Its element type.
        short: The short text alone.
        long: The one that outgrows a bucket of the cache, alone.
        in_batch: Whether the short text, in a batch with others as short, is what it is alone, and
        padded: beside a much longer one. None where rounding may explain the difference.
        in_batch_right: Whether the short text in a batch is the reference's.
        without_graphs: The short text without CUDA graphs; None where that was not tried.
    """

    dtype: str
    short: Comparison
    long: Comparison
    in_batch: bool | None = None
    padded: bool | None = None
    in_batch_right: bool | None = None
    without_graphs: Comparison | None = None

    def sections(self) -> tuple[str, ...]:
        """The sections of `KNOWN_ISSUES` that describe what is wrong; none for a sound engine."""
        short_wrong, long_wrong = self.short.wrong(self.dtype), self.long.wrong(self.dtype)
        wrong = [c for c in (self.short, self.long) if c.wrong(self.dtype)]
        launched = self.without_graphs
        grown = long_wrong and not short_wrong and bool(self.long.first)
        found = {
            "not-finite": any(not c.finite for c in wrong),
            "zeros-or-one-token": any(c.constant for c in wrong),
            "wrong-with-cuda-graphs": short_wrong
            and launched is not None
            and not launched.wrong(self.dtype),
            "wrong-tokens": bool(wrong) and not grown,
            "wrong-alone": short_wrong and bool(self.in_batch_right),
            "wrong-in-long-texts": grown,
            "wrong-in-a-batch": not short_wrong and self.in_batch is False,
            "wrong-beside-a-longer-text": not short_wrong
            and self.in_batch is not False
            and self.padded is False,
        }
        return tuple(section for section, applies in found.items() if applies)


def check_answer(
    reference: ReferenceAnswer, model: TwoTower, dtype: str, *, open_plain: Opener | None = None
) -> Iterator[CheckResult]:
    """Whether an engine gives the reference answer; if not, also where such errors are described.

    `open_plain` opens the same engine without CUDA graphs, only when something is wrong.
    """
    needed = max(len(a.prompt) + len(a.tokens) for a in (reference.short, reference.long))
    if model.max_context < needed:
        held = f"these engines hold texts of {model.max_context} tokens"
        do = f"build them with --max-context {needed} or more"
        yield CheckResult(
            _CHECK,
            None,
            f"{held}, the reference answer has {needed}: {do}",
        )
        return
    try:
        seen = _observed(reference, model, dtype, open_plain)
    except EngineOutputError as e:
        sections: tuple[str, ...] = ("not-finite",)
        yield CheckResult(_CHECK, False, str(e))
    else:
        sections = seen.sections()
        texts = f"short text {seen.short.described(dtype)}, long text {seen.long.described(dtype)}"
        what = f"{', '.join(s.replace('-', ' ') for s in sections)}: " if sections else ""
        yield CheckResult(_CHECK, not sections, what + texts)
    if sections:
        pages = ", ".join(f"{KNOWN_ISSUES}#{section}" for section in sections)
        yield CheckResult("known issues that look like this", None, pages)


def _observed(
    reference: ReferenceAnswer, model: TwoTower, dtype: str, open_plain: Opener | None
) -> Observed:
    prompt = reference.short.prompt
    alone = _answer(model, prompt, reference.short)
    short = compare(reference.short, alone)
    long = compare(reference.long, _answer(model, reference.long.prompt, reference.long))

    def in_batch(*others: tuple[int, ...]) -> tuple[int, ...]:
        results = model.generate([Request(p, DIFFUSION) for p in (prompt, *others)])
        return tuple(results[0].tokens)

    def unchanged(tokens: tuple[int, ...]) -> bool | None:
        # In half precision another shape may take another kernel, which rounds otherwise.
        same = tokens == alone.tokens
        return same if same or dtype == "float32" else None

    batch = in_batch(prompt[::-1], tuple(sorted(prompt)))
    padded = in_batch(reference.long.prompt)
    without_graphs = None
    if open_plain is not None and short.wrong(dtype):
        with open_plain() as other:
            without_graphs = compare(reference.short, _answer(other, prompt, reference.short))
    return Observed(
        dtype=dtype,
        short=short,
        long=long,
        in_batch=unchanged(batch),
        padded=unchanged(padded),
        in_batch_right=batch == reference.short.tokens,
        without_graphs=without_graphs,
    )
