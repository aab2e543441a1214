"""Where two traces of one request diverge, and how close a call it was."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from twotower.errors import TraceError
from twotower.trace.record import Trace, TraceStep


@dataclass(frozen=True, slots=True)
class Side:
    """What one of the two did at the position: whether it committed its prediction there.

    Token and `piece`, its text, are None where it made no such pass; `confidence` is a probability.
    """

    committed: bool
    token: int | None
    piece: str | None
    confidence: float | None


@dataclass(frozen=True, slots=True)
class TraceDiff:
    """The comparison; without a difference `block` and all that follows from it is None.

    Attributes:
        tokens_equal: Whether the final tokens are the same.
        first_token: Number of the first final token that differs; None if they are the same.
        passes: Passes of either.
        agreed_to: Largest difference of two confidences of a masked position before a difference.
        block: Where they diverge, and
        step: at which pass of it, and
        position: at which position of the block.
        sides: What either did there.
        margin: How close a call it was: see `margin_of`.
        margin_of: `threshold`: the larger distance of the two confidences from the threshold
            between them; `confidence`: their difference, where no threshold decided; None where one
            made no such pass.
    """

    tokens_equal: bool
    first_token: int | None
    passes: tuple[int, int]
    agreed_to: float
    block: int | None = None
    step: int | None = None
    position: int | None = None
    sides: tuple[Side, Side] | None = None
    margin: float | None = None
    margin_of: str | None = None

    @property
    def equal(self) -> bool:
        """Whether every pass committed the same, and the texts are the same."""
        return self.block is None and self.tokens_equal

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"equal": self.equal, **asdict(self)}


def diff_traces(a: Trace, b: Trace) -> TraceDiff:
    """Compares two traces; TraceError if they are of different requests."""
    _check_comparable(a, b)
    tokens = a.end.tokens, b.end.tokens
    first_token = None
    if tokens[0] != tokens[1]:
        pairs = zip(*tokens, strict=False)
        first_token = next((i for i, (x, y) in enumerate(pairs) if x != y), min(map(len, tokens)))
    passes = len(a.steps), len(b.steps)
    steps = [{(s.block, s.step): s for s in trace.steps} for trace in (a, b)]
    agreed_to = 0.0
    for place in sorted({*steps[0], *steps[1]}):
        pair = steps[0].get(place), steps[1].get(place)
        position = _first_position(*pair)
        if position is not None:
            sides = _side(a, pair[0], position), _side(b, pair[1], position)
            margin, of = _margin(*sides, a.header.config["confidence_threshold"])
            return TraceDiff(
                first_token is None,
                first_token,
                passes,
                agreed_to,
                *place,
                position,
                sides,
                margin,
                of,
            )
        if pair[0] and pair[1]:
            masked = [x == a.header.mask_token_id for x in pair[0].tokens]
            apart = (
                abs(x - y)
                for x, y, m in zip(
                    pair[0].confidence,
                    pair[1].confidence,
                    masked,
                    strict=True,
                )
                if m
            )
            agreed_to = max(agreed_to, *apart, 0.0)
    return TraceDiff(first_token is None, first_token, passes, agreed_to)


def _check_comparable(a: Trace, b: Trace) -> None:
    reasons = []
    if a.header.prompt_tokens != b.header.prompt_tokens:
        reasons.append(
            f"the prompts: {_short(a.header.prompt_tokens)} and {_short(b.header.prompt_tokens)}"
        )
    one, other = a.header.config, b.header.config
    reasons += [
        f"{k}: {one.get(k)!r} and {other.get(k)!r}"
        for k in sorted({*one, *other})
        if one.get(k) != other.get(k)
    ]
    if a.header.mask_token_id != b.header.mask_token_id:
        reasons.append(f"mask tokens: {a.header.mask_token_id} and {b.header.mask_token_id}")
    if reasons:
        raise TraceError(
            "the two traces are of different requests and cannot be compared",
            found="; ".join(reasons),
            do="record both with the same prompt and the same options",
        )


def _short(tokens: list[int]) -> str:
    more = " ..." if len(tokens) > 8 else ""
    return f"{len(tokens)} tokens [{' '.join(map(str, tokens[:8]))}{more}]"


def _first_position(a: TraceStep | None, b: TraceStep | None) -> int | None:
    """The first position that the two passes do not fill alike."""
    filled = [{p: s.next[p] for p in s.committed} if s else {} for s in (a, b)]
    return min(
        (p for p in {*filled[0], *filled[1]} if filled[0].get(p) != filled[1].get(p)), default=None
    )


def _side(trace: Trace, step: TraceStep | None, position: int) -> Side:
    if step is None:
        return Side(False, None, None, None)
    token = step.predicted[position]
    return Side(
        position in step.committed,
        token,
        trace.piece(token),
        step.confidence[position],
    )


def _margin(a: Side, b: Side, threshold: float) -> tuple[float | None, str | None]:
    if a.confidence is None or b.confidence is None:
        return None, None
    if (a.confidence > threshold) != (b.confidence > threshold):
        return round(
            max(abs(a.confidence - threshold), abs(b.confidence - threshold)), 6
        ), "threshold"
    return round(abs(a.confidence - b.confidence), 6), "confidence"
