"""Everything a batch of rows runs in: the state, the small arrays, and the engines bound to them once.

A session keeps one for its next call; those of running calls and open streams are closed with the
session.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from twotower.runtime.buffers import ContextState, DenoiserArrays
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.device import Array, Buffer, Event, Stream
from twotower.runtime.engines.tower_engine import Binding
from twotower.runtime.engines.towers import Towers
from twotower.runtime.schedule import capacity_bucket
from twotower.spec import (
    CANDIDATE_IDS,
    CANDIDATE_LOGPROBS,
    CHUNK_LENGTH,
    HIDDEN,
    MAX_CHUNK,
    PAST_LENGTH,
    TOKENS,
    state_tensors,
)

__all__ = ["Workspace", "Workspaces"]

_MOST_CONTEXT_BINDINGS = (
    32  # prompts end in chunks of any width; a session should not keep a binding for each for ever
)


class Workspace:
    """Buffers and bindings for one number of rows, reused from request to request; a run may use fewer.

    Bindings are made when they are first needed and kept: of the context engine for each chunk
    width and state set, of the denoiser for each state set. A step in the loop then writes small
    arrays in place and runs a binding, and does nothing else.

    Args:
        towers: The engines.
        rows: B.
        capacity: T to begin with.

    Attributes:
        chunk_length: [N] int64, valid tokens in each used row's chunk.
        past_length: [N] int64, tokens each of them has read.
        candidate_ids: [N,K] int64 and
        candidate_logprobs: [N,K] float32, what the head wrote last.
        unmasked: A token that is no mask, for the blocks of rows that have nothing to do.
    """

    chunk_length: Array
    past_length: Array
    candidate_ids: Array
    candidate_logprobs: Array

    def __init__(self, towers: Towers, *, rows: int, capacity: int) -> None:
        self.rows = rows
        self._towers = towers
        self.unmasked = int(towers.config.mask_token_id == 0)  # any token that is no mask
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
        self._denoiser_arrays: DenoiserArrays | None = None
        self._context: dict[tuple[int, int], Binding] = {}
        self._denoiser: dict[int, Binding] = {}
        self._head_binding: Binding | None = None
        self.use(rows)

    @property
    def capacity(self) -> int:
        """Positions the keys and values have room for."""
        return self._state.capacity

    def use(self, rows: int) -> None:
        """Takes the first N rows for the next run.

        The arrays show these alone. The others are padding, which computes nothing anybody sees:
        their chunks hold no valid token, so that their state stays as it is, and their blocks no
        mask.
        """
        assert 0 < rows <= self.rows, "a workspace is chosen for its rows"
        self._used = rows
        small = {**self._small, **self._head}
        for name in (CHUNK_LENGTH, PAST_LENGTH):
            self._memory.host(small[name])[rows:] = 0
        self.chunk_length = self._memory.host(small[CHUNK_LENGTH])[:rows]
        self.past_length = self._memory.host(small[PAST_LENGTH])[:rows]
        self.candidate_ids = self._memory.host(small[CANDIDATE_IDS])[:rows]
        self.candidate_logprobs = self._memory.host(small[CANDIDATE_LOGPROBS])[:rows]
        if self._denoiser_arrays is not None:
            self._denoiser_arrays.use(rows, unmasked=self.unmasked)

    def clear(self) -> None:
        """Back to the start of a text."""
        self._state.clear()

    def grow(self, capacity: int) -> None:
        """Makes room for longer texts, or moves to other memory; the engines must have finished what they were given."""
        close_all((*_taken(self._context), *_taken(self._denoiser)))
        self._state.grow(capacity)

    def tokens(self, width: int) -> Array:
        """The context engine's chunk of this width, [N,L] int64, to be written in place.

        All widths share their memory.
        """
        return self._memory.host(self._chunk(width))[: self._used]

    def denoiser(self, block_size: int) -> DenoiserArrays:
        """The denoiser's small arrays for this block size."""
        arrays = self._denoiser_arrays
        if arrays is None or arrays.block.shape[1] != block_size:
            close_all(_taken(self._denoiser))
            if arrays is not None:
                self._memory.release(tuple(arrays.by_name.values()))
            signature = self._towers.denoiser.signature
            arrays = DenoiserArrays(self._memory, signature, rows=self.rows, block_size=block_size)
            arrays.use(self._used, unmasked=self.unmasked)
            self._denoiser_arrays = arrays
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
        arrays = {
            **self._small,
            **self._hidden,
            TOKENS: self._chunk(width),
            **self._state.reads(which),
            **self._state.writes(which),
        }
        binding = self._context[width, which] = self._towers.context.bind(arrays)
        return binding


def _taken(bindings: dict[Any, Binding]) -> list[Callable[[], None]]:
    """What closes bindings, which are forgotten; nothing may be running."""
    closes = [binding.close for binding in bindings.values()]
    bindings.clear()
    return closes


_Result = TypeVar("_Result")


class Workspaces:
    """Gives out cleared workspaces and takes them back.

    Args:
        towers: The engines they are bound to.
    """

    def __init__(self, towers: Towers) -> None:
        self._towers = towers
        self._idle: Workspace | None = None
        self._ready: set[int] = set()
        self._working: list[Workspace] = []
        self._closed = False

    def take(self, rows: int, needed: int, largest: int, *, bound: int | None = None) -> Workspace:
        """Cleared buffers for `needed` positions, those of the last run if they have the very size: a larger cache would be slower.

        Args:
            rows: N; it has as many, or the next number of rows engines are bound for.
            needed: Positions the run begins with.
            largest: Most positions a session may have.
            bound: Rows the engines are bound for; None for the session's choice.
        """
        limits = self._towers.limits
        capacity = limits.capacity if limits is not None else capacity_bucket(needed, largest)
        work, self._idle = self._idle, None
        bound = bound or self._bound(rows)
        if work is not None and (work.rows, work.capacity) != (bound, capacity):
            work.close()  # before the new buffers are allocated
            work = None
        if work is None:
            work = Workspace(self._towers, rows=bound, capacity=capacity)
        else:
            with Cleanup(work.close) as undo:
                work.clear()
                undo.pop_all()
        work.use(rows)
        self._working.append(work)
        return work

    def give_back(self, work: Workspace, *, sound: bool) -> None:
        """Keeps a workspace for the next run; one of a failed run is dropped with whatever is in it."""
        self._working = [other for other in self._working if other is not work]
        if sound and self._idle is None and not self._closed:
            self._idle = work
        else:
            work.close()

    def lend(
        self,
        rows: int,
        needed: int,
        use: Callable[[Workspace], _Result],
        *,
        largest: int,
        bound: int | None = None,
    ) -> _Result:
        """What `use` makes of a workspace, which is kept afterwards; the arguments are `take`'s."""
        work = self.take(rows, needed, largest, bound=bound)
        with Cleanup(partial(self.give_back, work, sound=False)) as end:
            result = use(work)
            end.pop_all()
        self.give_back(work, sound=True)
        return result

    def warm_up(self, rows: int, largest: int, run: Callable[[Workspace], None]) -> None:
        """Lets `run` have a workspace; its number of rows is ready then, and batches are padded to such.

        Args:
            rows: As many, or the next number of rows engines are bound for.
            largest: As in `take`.
            run: Runs every pass.
        """
        count = self._next(rows)
        self.lend(count, MAX_CHUNK, run, largest=largest, bound=count)
        if self._towers.row_counts:
            self._ready.add(count)

    def _bound(self, rows: int) -> int:
        """The number of rows for a batch: the next that is ready, or else the next."""
        ready = min((count for count in self._ready if count >= rows), default=0)
        return ready or self._next(rows)

    def _next(self, rows: int) -> int:
        return next((count for count in self._towers.row_counts if count >= rows), rows)

    def relocate(self) -> None:
        """Moves the keys and values of everything that runs to other memory of the same size."""
        for work in self._working:
            work.grow(work.capacity)

    def close(self) -> None:
        """Closes all, also those that are not given back yet; idempotent."""
        self._closed = True
        idle, self._idle = self._idle, None
        close_all(work.close for work in (*self._working, *([idle] if idle else [])))
