"""Other programs that generate from the same weights, timed beside our autoregression.

Same prompts, greedy decoding; runs are interleaved and their tokens compared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Protocol

from twotower.bundle import Bundle
from twotower.config import GenerationConfig
from twotower.errors import ConfigError
from twotower.extras import require_libraries
from twotower.runtime import TwoTower

__all__ = ["PEERS", "Peer", "PeerSpeed", "measure_peer", "open_peer"]

PEERS = ("transformers",)
"""Peers by name."""


class Peer(Protocol):
    """A program that generates from the context tower's weights."""

    name: str
    version: str
    form: str
    threads: int

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Greedy continuations, `new_tokens` long each, of prompts of one length."""
        ...


@dataclass(frozen=True, slots=True)
class PeerSpeed:
    """Medians of a peer and of our autoregression, measured interleaved.

    `form` is which of several ways to compute it took. Tokens per second are of the whole batch,
    reading the prompts included; `ratio` is ours divided by the peer's; `equal_tokens` is the share
    of tokens at which both texts agree up to their first difference.
    """

    name: str
    version: str
    form: str
    threads: int
    tokens_per_second: float
    ours: float
    ratio: float
    equal_tokens: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def open_peer(name: str, bundle: Bundle, *, threads: int) -> Peer:
    """A peer of `PEERS` on the context tower of a float bundle.

    Raises:
        ConfigError: no such peer, or its library is not installed.
        BundleError: the bundle is quantized.
    """
    if name not in PEERS:
        raise ConfigError(
            f"there is no peer {name!r}",
            found=f"allowed: {', '.join(PEERS)}",
            do="choose one of them",
        )
    require_libraries("peers", "torch", "transformers", what=f"the peer {name}")
    from twotower.bench.peers.hugging_face import TransformersPeer

    return TransformersPeer(bundle, threads=threads)


def measure_peer(
    model: TwoTower,
    peer: Peer,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    runs: int,
) -> PeerSpeed:
    """Times both on prompts of one length, interleaved, after an uncounted run of each."""
    config = replace(GenerationConfig(), mode="ar", max_new_tokens=new_tokens, ignore_eos=True)
    mine: list[float] = []
    theirs: list[float] = []
    texts: tuple[list[list[int]], list[list[int]]] = ([], [])
    for run in range(runs + 1):
        began = time.perf_counter()
        results = model.generate([list(prompt) for prompt in prompts], config)
        between = time.perf_counter()
        answers = peer.generate(prompts, new_tokens)
        ended = time.perf_counter()
        texts = ([list(result.tokens) for result in results], answers)
        if run:
            mine.append(between - began)
            theirs.append(ended - between)
    count = len(prompts) * new_tokens
    ours, other = count / median(mine), count / median(theirs)
    agreed = sum(_agreed(a, b) for a, b in zip(*texts, strict=True))
    return PeerSpeed(
        name=peer.name,
        version=peer.version,
        form=peer.form,
        threads=peer.threads,
        tokens_per_second=other,
        ours=ours,
        ratio=ours / other,
        equal_tokens=agreed / count,
    )


def _agreed(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(a), len(b)))
