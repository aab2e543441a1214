"""Activation memory at published widths to the byte: what is alive at once, by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest

import pytest

from tests.helpers.published import of_layers
from twotower.builders.base import FUSED, KERNELS
from twotower.planning.expert_path import CHOSEN
from twotower.planning.scratch import Shapes, scratch
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER

B, T, S, D, V = 8, 4352, 16, 2688, 131072
LENGTHS = {"prefill": 256, "block": S, "decode": 1}
WORK = 8_192_000, 2_048_000
SHAPES = Shapes("bfloat16", B, T, S)

Moments = list[list[int]]


def together(moments: Iterable[Iterable[int]], always: Iterable[int]) -> int:
    """The largest of every moment in one place, the second largest in the next, and so on."""
    ordered = [sorted([*moment, *always], reverse=True) for moment in [[], *moments]]
    return sum(map(max, zip_longest(*ordered, fillvalue=0)))


def stream(length: int, item: int = 2) -> int:
    return B * length * D * item


def of_denoiser(layers: int, item: int = 2) -> list[int]:
    """Always alive: the stream twice, and a scale, a shift and a gate of every layer."""
    return [stream(S, item), stream(S, item), B * 3 * D * item * layers]


def scan(length: int) -> Moments:
    """64 heads of 64, 8 groups of states of 128, 6144 channels of the convolution."""
    projection = B * length * (64 * 64 + 6144 + 64) * 2
    if length == 1:
        return [[projection, projection, *WORK]]
    decay = B * 64 * length * length * 4
    common = [projection, *[B * 64 * length * 64 * 4] * 3, B * 8 * length * 128 * 4, WORK[0]]
    return [[decay, decay, *common], [decay, B * 64 * 64 * 128 * 4, *common]]


LOGITS = [[B * S * V * 4, B * S * V * 4]]


def test_a_scan() -> None:
    got = scratch(CONTEXT, of_layers("M"), SHAPES)
    assert got.profiles == {name: together(scan(n), [stream(n)]) for name, n in LENGTHS.items()}
    assert got.nbytes == got.profiles["prefill"]
    written = scratch(DENOISER, of_layers("MM"), SHAPES)
    assert written.nbytes == together([*scan(S)[:1], *LOGITS], of_denoiser(2))
    single = scratch(DENOISER, of_layers("M"), replace(SHAPES, block_size=1)).nbytes
    assert single == together([*scan(1), [B * V * 4] * 2], [stream(1), stream(1), B * 3 * D * 2])


def test_attention_of_the_context() -> None:
    """The fused kernel copies keys and values once; in float32 scores are written out."""
    keys = B * 2 * T * 128 * 2
    got = scratch(CONTEXT, of_layers("*"), SHAPES).profiles
    for name, n in LENGTHS.items():
        queries, mask = B * 32 * n * 128 * 2, [B * 2 * n * T * 2] if n > 1 else []
        moments = [[queries, *WORK], [keys, keys, queries, queries]]
        assert got[name] == together(moments, [stream(n), *mask])
    got = scratch(CONTEXT, of_layers("*"), replace(SHAPES, dtype="float32")).profiles
    for name, n in LENGTHS.items():
        scores = B * 32 * n * T * 4
        moments = [[B * 32 * n * 128 * 4, *WORK], [scores, scores, *WORK], [2 * keys, *WORK]]
        assert got[name] == together(moments, [stream(n, 4)])


def test_attention_that_keeps_its_groups_together() -> None:
    """Keys and values are copied for every query head, but for a single position."""
    got = scratch(CONTEXT, replace(of_layers("*"), num_key_value_heads=16), SHAPES).profiles
    for name, n in LENGTHS.items():
        queries, every = B * 32 * n * 128 * 2, B * 32 * T * 128 * 2
        mask = [B * n * T * 2] if n > 1 else []
        copies = [[every, every, queries, queries]] if n > 1 else []
        assert got[name] == together([[queries, *WORK], *copies], [stream(n), *mask])


@pytest.mark.parametrize("capacity", [1024, T, 65536])
def test_attention_of_the_denoiser_sees_the_cache_and_its_own_block(capacity: int) -> None:
    scores = B * 32 * S * (capacity + S) * 4
    queries = [B * 32 * S * 128 * 2, *WORK]
    got = scratch(DENOISER, of_layers("*"), replace(SHAPES, capacity=capacity))
    assert got.nbytes == together([queries, [scores, scores], *LOGITS], of_denoiser(1))


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("path", ["dense", CHOSEN, FUSED])
def test_experts(path: str, expanded: bool) -> None:
    """All for every token, one after another for its own, or pairs of both."""
    got = scratch(CONTEXT, of_layers("E"), replace(SHAPES, path=path, expanded=expanded)).profiles
    copy = [1856 * D * 2 * (128 if path == "dense" else 1)] if expanded else []
    for name, n in LENGTHS.items():
        tokens = B * n
        rows = [128 * tokens * D * 2, 128 * tokens * 1856 * 2, WORK[0]]
        if path != "dense":
            hidden = tokens * (6 if path == FUSED else 1) * 1856 * 2
            rows = [tokens * 6 * D * 2, tokens * 6 * D * 2, hidden]
        assert got[name] == together([[*rows, *copy]], [stream(n)])


def test_a_perceptron_and_the_head() -> None:
    hidden = {n: B * n * 1856 * 2 for n in LENGTHS.values()}
    got = scratch(CONTEXT, of_layers("-"), SHAPES).profiles
    assert got == {
        name: together([[hidden[n], hidden[n], *WORK]], [stream(n)]) for name, n in LENGTHS.items()
    }
    head = together([[B * V * 2, *WORK], [B * V * 2, B * V * 4]], [])
    assert scratch(CONTEXT_HEAD, of_layers("M"), SHAPES).nbytes == head


def test_programs_between_kernels() -> None:
    """Of three the first two are alike; the last writes the logits, widening them."""
    config, shapes = of_layers("MEMEM"), replace(SHAPES, path=KERNELS)
    inner = together(scan(S)[:1], of_denoiser(1))
    last = together([*scan(S)[:1], [B * S * V * 4, B * S * V * 2]], of_denoiser(1))
    assert scratch(DENOISER, config, shapes).nbytes == max(inner, last)
    own = scratch(DENOISER, config, replace(shapes, arenas=True))
    assert (own.nbytes, own.profiles) == (2 * inner + last, {"denoise": 2 * inner + last})
    context = scratch(CONTEXT, config, replace(shapes, arenas=True))
    want = {name: 3 * together(scan(n), [stream(n)]) for name, n in LENGTHS.items()}
    assert context.profiles == want
    assert scratch(CONTEXT_HEAD, config, shapes) == scratch(CONTEXT_HEAD, config, SHAPES)


def test_the_two_largest_are_named() -> None:
    named = {
        "ME": "experts [E,B*L,D] and experts [E,B*L,F]",
        "M": "decay [B,H,L,L]",
        "*": "mask [B,KV,L,T] and keys [B,KV,T,d]",
    }
    assert {
        letters: scratch(CONTEXT, of_layers(letters), SHAPES).because for letters in named
    } == named
