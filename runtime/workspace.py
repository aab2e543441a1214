"""The engines of a bundle bound to the buffers of one batch: what the loop drives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.runtime.buffers import Array, StateBuffers, allocate
from twotower.runtime.engines.base import Binding, Towers
from twotower.runtime.streams import Event, HostStream, Stream
from twotower.spec import (
    BLOCK,
    CANDIDATE_IDS,
    CANDIDATE_LOGPROBS,
    CHUNK_LENGTH,
    COMMIT_FLOOR,
    CONFIDENCE,
    CONTEXT_LENGTH,
    HIDDEN,
    MASKED_LEFT,
    NEXT_BLOCK,
    NOISE,
    PAST_LENGTH,
    PREDICTED,
    TEMPERATURE,
    THRESHOLD,
    TOKENS,
)

__all__ = ["Workspace"]


class Workspace:
    """Buffers, bindings and streams for `rows` texts, reused from request to request.

    Engines are bound once for every (chunk width, state parity); a step writes a few small arrays and runs a binding.
    The conv and SSM states alternate between two sets (`parity` says which is current), keys and values stay where they are.

    Args:
        towers: The engines.
        rows: B.
        block_size: S.
        capacity: T to begin with.
    """

    def __init__(self, towers: Towers, *, rows: int, block_size: int, capacity: int) -> None:
        self._towers = towers
        self.rows, self.block_size = rows, block_size
        self._state = StateBuffers(towers.config, towers.dtype, rows=rows, capacity=capacity)
        self._parity = 0
        self._chunks: dict[tuple[int, int], Binding] = {}
        self._denoisers: list[Binding] = []
        self._head: Binding | None = None
        self._tokens: dict[int, Array] = {}
        sizes = {"B": rows, "S": block_size}
        context, head, denoiser = towers.context.signature, towers.context_head.signature, towers.denoiser.signature
        self._small = allocate([context.tensor(n) for n in (CHUNK_LENGTH, PAST_LENGTH, HIDDEN)], sizes)
        self._small |= allocate(head.outputs, sizes)
        step_inputs = (BLOCK, CONTEXT_LENGTH, THRESHOLD, COMMIT_FLOOR, TEMPERATURE, NOISE)
        self._block = allocate([*(denoiser.tensor(n) for n in step_inputs), *denoiser.outputs], sizes)
        self.context_stream: Stream = HostStream()
        self.denoiser_stream: Stream = HostStream()

    @property
    def capacity(self) -> int:
        return self._state.capacity

    @property
    def candidates(self) -> tuple[Array, Array]:
        """(ids, log-probabilities) [B,K] after `score`, best first; overwritten by the next one."""
        return self._small[CANDIDATE_IDS], self._small[CANDIDATE_LOGPROBS]

    def reset(self) -> None:
        """Makes all rows empty texts."""
        self._state.clear()
        self._parity = 0

    def ensure_capacity(self, capacity: int, used: int) -> None:
        """Grows the cache if it is smaller, keeping the first `used` slots; the engines are bound anew when next run."""
        if capacity > self.capacity:
            self._state.grow(capacity, used)
            self._chunks.clear()
            self._denoisers.clear()

    def extend(self, tokens: Sequence[Sequence[int]], past: Sequence[int], *, width: int) -> Event:
        """Reads up to `width` tokens a row into the state; rows may be shorter or empty. Returns the event of its end."""
        array = self._tokens.setdefault(width, np.zeros((self.rows, width), np.int64))
        array.fill(0)
        for row, ids in enumerate(tokens):
            array[row, : len(ids)] = ids
            self._small[CHUNK_LENGTH][row] = len(ids)
        self._small[PAST_LENGTH][:] = past
        done = self._context(width, array).run(self.context_stream)
        self._parity = 1 - self._parity
        self.denoiser_stream.wait(done)
        return done

    def score(self) -> Event:
        """Fills `candidates` for each row's last token read."""
        if self._head is None:
            self._head = self._towers.context_head.bind(self._small)
        return self._head.run(self.context_stream)

    def start_block(self, context_lengths: Sequence[int], thresholds: Sequence[float], temperatures: Sequence[float]) -> Array:
        """Sets what stays the same for a block's steps; returns the block [B,S], to be filled by the caller."""
        self._block[CONTEXT_LENGTH][:] = context_lengths
        self._block[THRESHOLD][:] = thresholds
        self._block[TEMPERATURE][:] = temperatures
        return self._block[BLOCK]

    @property
    def step_inputs(self) -> tuple[Array, Array]:
        """(commit_floor [B], noise [B,S,K]) of the next denoising step, to be filled by the caller."""
        return self._block[COMMIT_FLOOR], self._block[NOISE]

    def denoise(self) -> Event:
        """One denoising step of every row."""
        if not self._denoisers:
            self._denoisers = [self._towers.denoiser.bind({**self._block, **self._state.inputs(p)}) for p in (0, 1)]
        done = self._denoisers[self._parity].run(self.denoiser_stream)
        self.context_stream.wait(done)
        return done

    @property
    def step_outputs(self) -> tuple[Array, Array, Array, Array]:
        """(next_block, predicted, confidence [B,S], masked_left [B]) of the last step; overwritten by the next one."""
        return self._block[NEXT_BLOCK], self._block[PREDICTED], self._block[CONFIDENCE], self._block[MASKED_LEFT]

    def _context(self, width: int, tokens: Array) -> Binding:
        key = (width, self._parity)
        if key not in self._chunks:
            state = {**self._state.inputs(self._parity), **self._state.outputs(self._parity)}
            small = {name: self._small[name] for name in (CHUNK_LENGTH, PAST_LENGTH, HIDDEN)}
            self._chunks[key] = self._towers.context.bind({TOKENS: tokens, **small, **state})
        return self._chunks[key]
