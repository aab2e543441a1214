"""The denoiser graph's tail: logits become tokens, confidences and the commit decision."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from twotower.config import ModelConfig
from twotower.export.graphs.recorder import GraphBuilder
from twotower.spec import (
    BLOCK,
    COMMIT_FLOOR,
    CONFIDENCE,
    MASKED_LEFT,
    NEXT_BLOCK,
    NOISE,
    PREDICTED,
    TEMPERATURE,
    THRESHOLD,
    candidate_count,
)

_NEVER = -1e30  # the mask token's logit: its probability underflows to exactly 0 in float32


@dataclass(frozen=True, slots=True)
class MaskInfo:
    """Which positions of the block are masked, [B,S] bool, and how many, [B,1] int64."""

    masked: ir.Value
    count: ir.Value


def mask_info(graph: GraphBuilder, config: ModelConfig) -> tuple[MaskInfo, ir.Value]:
    """The block's masks and t [B] float32, the masked fraction of each row's own block."""
    block = graph.input(BLOCK)
    masked = graph.op(
        "Equal",
        block,
        graph.constant(config.mask_token_id),
    )
    ones = graph.op("Cast", masked, to=ir.DataType.INT64)
    count = graph.sum(ones, 1, keepdims=1)
    length = graph.op(
        "Cast",
        graph.size(block, 1),
        to=ir.DataType.FLOAT,
    )
    fraction = graph.op(
        "Div",
        graph.op("Cast", count, to=ir.DataType.FLOAT),
        length,
    )
    return MaskInfo(masked, count), graph.squeeze(fraction, 1)


def sample_and_commit(
    graph: GraphBuilder,
    logits: ir.Value,
    masks: MaskInfo,
    config: ModelConfig,
) -> None:
    """Records the graph's four outputs from logits [B,S,V] float32."""
    predicted, confidence = choose(graph, logits, config)
    commit = committed_places(graph, confidence, masks)
    graph.output(PREDICTED, predicted)
    graph.output(CONFIDENCE, confidence)
    graph.output(
        NEXT_BLOCK,
        graph.op(
            "Where",
            commit,
            predicted,
            graph.input(BLOCK),
        ),
    )
    committed = graph.op("Cast", commit, to=ir.DataType.INT64)
    committed = graph.sum(committed, 1, keepdims=1)
    left = graph.op("Sub", masks.count, committed)
    graph.output(MASKED_LEFT, graph.squeeze(left, 1))


def choose(
    graph: GraphBuilder,
    logits: ir.Value,
    config: ModelConfig,
) -> tuple[ir.Value, ir.Value]:
    """The chosen token and its un-tempered probability, [B,S] each.

    It has the highest logit / temperature + noise of the K best, or is the best itself at
    temperature 0. Noise of -inf excludes a candidate (that is top-k).
    """
    # Positions of all rows are one axis, as the product before writes them, lest TopK copies them.
    count, penalty = candidate_count(config), [0.0] * config.vocab_size
    penalty[config.mask_token_id] = _NEVER
    rows = graph.reshape(logits, -1, config.vocab_size)
    rows = graph.op("Add", rows, graph.constant(penalty, "float32"))
    best, ids = graph.ops(
        "TopK",
        2,
        rows,
        graph.constant([count]),
        axis=-1,
    )
    relative, total = relative_to_best(graph, rows, best)
    probabilities = graph.op("Div", graph.op("Exp", relative), total)
    length = graph.size(graph.input(BLOCK), 1)
    best, ids, probabilities = (
        graph.reshape(x, -1, length, count) for x in (best, ids, probabilities)
    )
    temperature = graph.unsqueeze(graph.input(TEMPERATURE), 1, 2)
    greedy = graph.op(
        "LessOrEqual",
        temperature,
        graph.constant(0.0, "float32"),
    )
    divisor = graph.op(
        "Where",
        greedy,
        graph.constant(1.0, "float32"),
        temperature,
    )
    noisy = graph.op(
        "Add",
        graph.op("Div", best, divisor),
        graph.input(NOISE),
    )
    sampled = graph.op("ArgMax", noisy, axis=-1, keepdims=1)
    place = graph.op("Where", greedy, graph.constant(0), sampled)
    token = graph.op("GatherElements", ids, place, axis=-1)
    confidence = graph.op("GatherElements", probabilities, place, axis=-1)
    last = graph.constant([-1])
    return graph.op("Squeeze", token, last), graph.op("Squeeze", confidence, last)


def relative_to_best(
    graph: GraphBuilder,
    logits: ir.Value,
    best: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Logits `best` [...,K] less the greatest of all, and the sum of exp of all so, [...,1].

    `best` is TopK of `logits` [...,V], in order. ReduceLogSumExp would look for the maximum once
    more, and write all logits out for that.
    """
    ends = graph.constant([0]), graph.constant([1]), graph.constant([-1])
    greatest = graph.op("Slice", best, *ends)
    shares = graph.op("Exp", graph.op("Sub", logits, greatest))
    total = graph.sum(shares, -1, keepdims=1)
    return graph.op("Sub", best, greatest), total


def committed_places(
    graph: GraphBuilder,
    confidence: ir.Value,
    masks: MaskInfo,
) -> ir.Value:
    """The positions that take their prediction, [B,S] bool: the most confident masked ones.

    A position's rank is the number of masked positions ahead of it (more confident, or equal and
    further left), summed over S x S comparisons: no sort, no data-dependent shape.
    """
    mine = graph.unsqueeze(confidence, 2)
    other = graph.unsqueeze(confidence, 1)
    places = graph.places(confidence, 1)
    first = graph.unsqueeze(places, 0)
    second = graph.unsqueeze(places, 1)
    left_of = graph.op("Less", first, second)
    tied = graph.op("And", graph.op("Equal", other, mine), left_of)
    ahead = graph.op("Or", graph.op("Greater", other, mine), tied)
    ahead = graph.op("And", ahead, graph.unsqueeze(masks.masked, 1))
    ahead = graph.op("Cast", ahead, to=ir.DataType.INT64)
    rank = graph.sum(ahead, 2)

    threshold = graph.unsqueeze(graph.input(THRESHOLD), 1)
    sure = graph.op(
        "And",
        graph.op("Greater", confidence, threshold),
        masks.masked,
    )
    count = graph.op("Cast", sure, to=ir.DataType.INT64)
    count = graph.sum(count, 1, keepdims=1)
    floor = graph.unsqueeze(graph.input(COMMIT_FLOOR), 1)
    # More than are masked commits them all: no Min needed.
    count = graph.op("Max", count, floor, graph.constant([[1]]))
    return graph.op(
        "And",
        masks.masked,
        graph.op("Less", rank, count),
    )
