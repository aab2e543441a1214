"""Everything a batch of rows runs in: the state, the small arrays, and the engines bound to them once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from twotower.runtime.buffers import DenoiserArrays
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.engines.base import Binding
from twotower.runtime.engines.towers import Towers
from twotower.runtime.memory import Array, Buffer
from twotower.runtime.state import ContextState
from twotower.runtime.streams import Event, Stream
from twotower.spec import CANDIDATE_IDS, CANDIDATE_LOGPROBS, CHUNK_LENGTH, HIDDEN, MAX_CHUNK, PAST_LENGTH, TOKENS, state_tensors

__all__ = ["Workspace"]

_MOST_CONTEXT_BINDINGS = 32  # prompts end in chunks of any width; a session should not keep a binding for each for ever


class Workspace:
    """Buffers and bindings for one number of rows, reused from request to request.

    Bindings are made when they are first needed and kept: of the context engine for each chunk width and state set, of the denoiser for
    each state set. A step in the loop then writes small arrays in place and runs a binding, and does nothing else.

    Args:
        towers: The engines.
        rows: B.
        capacity: T to begin with.

    Attributes:
        chunk_length: [B] int64, valid tokens in each row's chunk.
        past_length: [B] int64, tokens each row has read.
        candidate_ids: [B,K] int64 and
        candidate_logprobs: [B,K] float32, what the head wrote last.
    """

    def __init__(self, towers: Towers, *, rows: int, capacity: int) -> None:
        self.rows = rows
        self._towers = towers
        self._memory = memory = towers.memory
        context, head = towers.context.signature, towers.context_head.signature
        # Tokens last: what a narrow chunk leaves of them unused is then not copied to a device.
        small = [context.tensor(n) for n in (CHUNK_LENGTH, PAST_LENGTH, TOKENS)]
        with Cleanup() as undo:  # the large part last: a refusal of too many rows costs nothing
            self._small = memory.small(small, {"B": rows, "L": MAX_CHUNK})
            undo.callback(lambda: memory.release(tuple(self._small.values())))
            self._hidden = {HIDDEN: memory.state(context.tensor(HIDDEN), {"B": rows})}
            undo.callback(lambda: memory.release(tuple(self._hidden.values())))
            best = [head.tensor(n) for n in (CANDIDATE_IDS, CANDIDATE_LOGPROBS)]
            self._head = memory.small(best, {"B": rows})
            undo.callback(lambda: memory.release(tuple(self._head.values())))
            state = state_tensors(towers.config, towers.dtype)
            self._state = ContextState(memory, state, rows=rows, capacity=capacity)
            undo.pop_all()
        self.chunk_length, self.past_length = memory.host(self._small[CHUNK_LENGTH]), memory.host(self._small[PAST_LENGTH])
        self.candidate_ids = memory.host(self._head[CANDIDATE_IDS])
        self.candidate_logprobs = memory.host(self._head[CANDIDATE_LOGPROBS])
        self._denoiser_arrays: DenoiserArrays | None = None
        self._context: dict[tuple[int, int], Binding] = {}
        self._denoiser: dict[int, Binding] = {}
        self._head_binding: Binding | None = None

    @property
    def capacity(self) -> int:
        """Positions the keys and values have room for."""
        return self._state.capacity

    def clear(self) -> None:
        """Back to the start of a text."""
        self._state.clear()

    def grow(self, capacity: int) -> None:
        """Makes room for longer texts, or moves to other memory; the engines must have finished what they were given."""
        close_all((*_taken(self._context), *_taken(self._denoiser)))
        self._state.grow(capacity)

    def tokens(self, width: int) -> Array:
        """The context engine's chunk of this width, [B,L] int64, to be written in place; all widths share their memory."""
        return self._memory.host(self._chunk(width))

    def denoiser(self, block_size: int) -> DenoiserArrays:
        """The denoiser's small arrays for this block size."""
        arrays = self._denoiser_arrays
        if arrays is None or arrays.block.shape[1] != block_size:
            close_all(_taken(self._denoiser))
            if arrays is not None:
                self._memory.release(tuple(arrays.by_name.values()))
            signature = self._towers.denoiser.signature
            arrays = self._denoiser_arrays = DenoiserArrays(self._memory, signature, rows=self.rows, block_size=block_size)
        return arrays

    def extend(self, width: int, stream: Stream) -> Event:
        """Lets the context tower read the chunk of this width and move the state on."""
        end = int(self.past_length.max()) + width
        assert end <= self.capacity, "the loop grows the capacity before it writes"
        which = self._state.current
        binding = self._context.get((width, which))
        if binding is None:
            binding = self._bind_context(width, which)
        event = binding.run(stream)
        self._state.moved_on(end)
        return event

    def denoise(self, stream: Stream) -> Event:
        """One denoising step on the small arrays and the current state."""
        which = self._state.current
        binding = self._denoiser.get(which)
        if binding is None:
            assert self._denoiser_arrays is not None, "the small arrays are filled first"
            arrays = {**self._denoiser_arrays.by_name, **self._state.reads(which)}
            binding = self._denoiser[which] = self._towers.denoiser.bind(arrays)
        return binding.run(stream)

    def head(self, stream: Stream) -> Event:
        """The candidates after each row's last token read."""
        if self._head_binding is None:
            self._head_binding = self._towers.context_head.bind({**self._head, **self._hidden})
        return self._head_binding.run(stream)

    def close(self) -> None:
        """Lets go of bindings, then of buffers; the engines must have finished what they were given. Idempotent."""
        bindings = [*_taken(self._context), *_taken(self._denoiser)]
        if self._head_binding is not None:
            bindings.append(self._head_binding.close)
            self._head_binding = None
        arrays, self._denoiser_arrays = self._denoiser_arrays, None
        small = (*self._small.values(), *self._hidden.values(), *self._head.values())
        buffers = (*small, *(arrays.by_name.values() if arrays else ()))
        close_all((*bindings, partial(self._memory.release, buffers), self._state.close))

    def _chunk(self, width: int) -> Buffer:
        return self._memory.view(self._small[TOKENS], (self.rows, width))

    def _bind_context(self, width: int, which: int) -> Binding:
        if len(self._context) >= _MOST_CONTEXT_BINDINGS:
            self._context.pop(next(iter(self._context))).close()
        arrays = {**self._small, **self._hidden, TOKENS: self._chunk(width), **self._state.reads(which), **self._state.writes(which)}
        binding = self._context[width, which] = self._towers.context.bind(arrays)
        return binding


def _taken(bindings: dict[Any, Binding]) -> list[Callable[[], None]]:
    """What closes bindings, which are forgotten; nothing may be running."""
    closes = [binding.close for binding in bindings.values()]
    bindings.clear()
    return closes
