"""A toy two-tower model in NumPy behind the engine protocol, and a log of its calls.

The toy has the shape of the contract and no mathematics: its "state" is a hash of every token read,
spread over the KV, convolution and SSM buffers, and every prediction is a hash of all of it. A
token read twice, a swapped buffer or a stale cache therefore changes the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twotower.config import LayerKind, ModelConfig
from twotower.runtime.device import Array, Event, Stream, Streams
from twotower.runtime.engines.towers import Towers
from twotower.spec import (
    CONTEXT,
    CONTEXT_HEAD,
    DENOISER,
    TowerSignature,
    candidate_count,
    past_conv,
    past_key,
    past_ssm,
    past_value,
    present_conv,
    present_ssm,
    signatures,
)

__all__ = ["FakeEngine", "FakeTowers", "fake_config", "fake_towers"]

_PRIME = 1_000_003  # below 2**24: hashes are exact in float32
_KV, _SSM = 0, 1  # layers of `fake_config`


def fake_config(**changes: Any) -> ModelConfig:
    """One attention and one Mamba layer, 97 tokens."""
    sizes: dict[str, Any] = {
        "layers": (LayerKind.ATTENTION, LayerKind.MAMBA),
        "vocab_size": 97,
        "hidden_size": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "mamba_num_heads": 1,
        "mamba_head_dim": 2,
        "ssm_state_size": 2,
        "max_position_embeddings": 4096,
        "dtype": "float32",
    }
    return ModelConfig(**{**sizes, **changes})


@dataclass(frozen=True)
class FakeEvent:
    """The end of one run; `wait_done` is logged."""

    name: str
    log: list[str]

    def wait_done(self) -> None:
        self.log.append(f"host waits for {self.name}")


@dataclass(frozen=True)
class FakeStream:
    """A queue that only logs what it waits for."""

    name: str
    log: list[str]

    def wait(self, event: Event) -> None:
        self.log.append(f"{self.name} stream waits for {getattr(event, 'name', 'nothing')}")

    def close(self) -> None:
        return


@dataclass
class FakeEngine:
    """One graph: counts binds and runs, fails or returns NaN when told to.

    Attributes:
        fail_at: Number of the run that raises.
        nan_at: Number of the run whose float outputs and states are all NaN.
    """

    signature: TowerSignature
    compute: Callable[[Mapping[str, Array]], None]
    log: list[str]
    binds: int = 0
    runs: int = 0
    closed: int = 0
    fail_at: int | None = None
    nan_at: int | None = None
    addresses: set[tuple[int, ...]] = field(default_factory=set)

    def bind(self, arrays: Mapping[str, Array]) -> _FakeBinding:
        assert not self.closed, "bound after close"
        self.binds += 1
        for spec in (*self.signature.inputs, *self.signature.outputs):
            a = arrays[spec.name]
            assert a.flags.c_contiguous and len(a.shape) == len(spec.axes), spec.name
            assert all(a.shape[i] == n for i, n in enumerate(spec.axes) if isinstance(n, int)), (
                spec.name
            )
        return _FakeBinding(self, dict(arrays))

    def close(self) -> None:
        self.closed += 1


@dataclass(frozen=True)
class _FakeBinding:
    engine: FakeEngine
    arrays: dict[str, Array]

    def run(self, stream: Stream) -> FakeEvent:
        e = self.engine
        assert not e.closed, "run after close"
        e.runs += 1
        name = f"{e.signature.name} {e.runs}"
        e.log.append(f"{getattr(stream, 'name', 'host')} stream runs {name}")
        if e.fail_at == e.runs:
            raise RuntimeError("the device fell off the bus")
        e.compute(self.arrays)
        if e.nan_at == e.runs:
            for spec in e.signature.outputs:
                if spec.dtype == "float32":
                    self.arrays[spec.name].fill(np.nan)
        e.addresses.add(tuple(a.ctypes.data for a in self.arrays.values()))
        return FakeEvent(name, e.log)

    def close(self) -> None:
        return


@dataclass
class FakeTowers:
    """The towers with their fakes at hand."""

    towers: Towers
    context: FakeEngine
    head: FakeEngine
    denoiser: FakeEngine
    log: list[str]


def fake_towers(config: ModelConfig | None = None, *, eos_every: int = 0) -> FakeTowers:
    """A toy model.

    Args:
        config: Sizes; the layers must be one attention and one Mamba layer.
        eos_every: The toy predicts the end-of-sequence token where a hash is divisible by it; 0 for
            only by chance.
    """
    config = config or fake_config()
    log: list[str] = []
    toy = _Toy(config, eos_every)
    every = signatures(config, "float32")
    context = FakeEngine(every[CONTEXT], toy.context, log)
    head = FakeEngine(every[CONTEXT_HEAD], toy.head, log)
    denoiser = FakeEngine(every[DENOISER], toy.denoiser, log)
    streams = Streams(FakeStream("context", log), FakeStream("denoiser", log))
    return FakeTowers(
        Towers(config, "float32", context, head, denoiser, streams=streams),
        *(context, head, denoiser),
        log,
    )


def _mix(*values: int) -> int:
    out = 17
    for v in values:
        out = (out * 31 + v * 7 + 3) % _PRIME
        out = out * out % _PRIME  # squaring: no linear relation lets two mistakes cancel
    return out


class _Toy:
    def __init__(self, config: ModelConfig, eos_every: int) -> None:
        self.config = config
        self.candidates = candidate_count(config)
        self.eos_every = eos_every

    def context(self, a: Mapping[str, Array]) -> None:
        key, value = a[past_key(_KV)], a[past_value(_KV)]
        conv, ssm = a[past_conv(_SSM)], a[past_ssm(_SSM)]
        for b, tokens in enumerate(a["tokens"]):
            length, past = int(a["chunk_length"][b]), int(a["past_length"][b])
            assert past + len(tokens) <= key.shape[2], "written past the end of the cache"
            for i, token in enumerate(tokens):  # padding is written too, as the real graph does
                key[b, 0, past + i] = _mix(int(token), past + i)
                value[b, 0, past + i] = int(token)
            state = float(ssm[b].reshape(-1)[0])
            window = [float(x) for x in conv[b, :, 0]]
            for token in tokens[:length]:
                state = state if np.isnan(state) else float(_mix(int(state), int(token)))
                window = [*window[1:], float(token)]
            a[present_ssm(_SSM)][b] = state
            a[present_conv(_SSM)][b] = np.asarray(window)[:, None]
            a["hidden"][b] = self._digest(
                a[present_conv(_SSM)], a[present_ssm(_SSM)], key, value, row=b, length=past + length
            )

    def _digest(
        self, conv: Array, ssm: Array, key: Array, value: Array, *, row: int, length: int
    ) -> float:
        """A hash of the state; NaN if any buffer holds one, also at masked positions."""
        seen = (np.arange(key.shape[2]) < length).astype(np.float64)
        total = float(key[row, 0, :, 0].astype(np.float64) @ seen) + 3 * float(
            value[row, 0, :, 0].astype(np.float64) @ seen
        )
        parts = [total, float(conv[row].sum()), float(ssm[row].reshape(-1)[-1])]
        if not np.isfinite(parts).all():
            return np.nan
        return float(_mix(*(int(p) for p in parts), length))

    def _rng(self, *values: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(_mix(*values)))

    def head(self, a: Mapping[str, Array]) -> None:
        for b, hidden in enumerate(a["hidden"]):
            if np.isnan(hidden[0]):
                a["candidate_logprobs"][b] = np.nan
                continue
            rng = self._rng(int(hidden[0]))
            logits = rng.standard_normal(self.config.vocab_size) * 3
            self._lean_to_eos(logits, int(hidden[0]))
            ids = np.argsort(-logits)[: self.candidates]
            a["candidate_ids"][b] = ids
            a["candidate_logprobs"][b] = logits[ids] - np.log(np.exp(logits).sum())

    def _lean_to_eos(self, logits: Array, digest: int) -> None:
        if self.eos_every and digest % self.eos_every == 0:
            logits[self.config.eos_token_ids[0]] = 50

    def denoiser(self, a: Mapping[str, Array]) -> None:
        mask = self.config.mask_token_id
        a["next_block"][...] = a["block"]
        for b, block in enumerate(a["block"]):
            state = (a[past_conv(_SSM)], a[past_ssm(_SSM)], a[past_key(_KV)], a[past_value(_KV)])
            digest = self._digest(*state, row=b, length=int(a["context_length"][b]))
            if np.isnan(digest):
                a["confidence"][b] = np.nan
                continue
            logits = (
                self._rng(int(digest), *(int(t) for t in block)).standard_normal(
                    (len(block), self.config.vocab_size)
                )
                * 4
            )
            for i in range(len(block)):
                self._lean_to_eos(logits[i], int(digest) + i)
            logits[:, mask] = -np.inf
            self._choose(a, b, logits)
            self._commit(a, b, block == mask)
            a["masked_left"][b] = int((a["next_block"][b] == mask).sum())

    def _choose(self, a: Mapping[str, Array], b: int, logits: Array) -> None:
        ids = np.argsort(-logits, axis=-1)[:, : self.candidates]
        best = np.take_along_axis(logits, ids, -1)
        place = np.zeros(len(ids), np.int64)
        if a["temperature"][b] > 0:
            place = np.argmax(best / a["temperature"][b] + a["noise"][b], -1)
        rows = np.arange(len(ids))
        a["predicted"][b] = ids[rows, place]
        a["confidence"][b] = np.exp(best[rows, place] - np.log(np.exp(logits).sum(-1)))

    def _commit(self, a: Mapping[str, Array], b: int, masked: Array) -> None:
        confidence = np.where(masked, a["confidence"][b], -1.0)
        count = max(int((confidence > a["threshold"][b]).sum()), int(a["commit_floor"][b]), 1)
        chosen = [i for i in np.argsort(-confidence, kind="stable")[:count] if masked[i]]
        a["next_block"][b, chosen] = a["predicted"][b, chosen]
