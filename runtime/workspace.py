"""Everything a batch of rows runs in: the state, the small arrays, and the bound engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.device import Array, Buffer, Event, Memory, span_of
from twotower.runtime.engines.tower_engine import Binding, TowerEngine
from twotower.runtime.engines.towers import Towers
from twotower.runtime.schedule import capacity_bucket
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
    MAX_CHUNK,
    NEXT_BLOCK,
    NOISE,
    PAST_LENGTH,
    PREDICTED,
    TEMPERATURE,
    THRESHOLD,
    TOKENS,
    StateTensor,
    TowerSignature,
    state_tensors,
)

_MOST_CONTEXT_BINDINGS = 32  # prompts end in chunks of any width: not a binding for each for ever
_DENOISER_SMALL = (
    *(BLOCK, CONTEXT_LENGTH, THRESHOLD, COMMIT_FLOOR, TEMPERATURE, NOISE),
    *(NEXT_BLOCK, PREDICTED, CONFIDENCE, MASKED_LEFT),
)


class DenoiserArrays:
    """The denoiser's small arrays, in place (shapes as in `spec`); `by_name` may have more rows."""

    block: Array
    context_length: Array
    threshold: Array
    commit_floor: Array
    temperature: Array
    noise: Array
    next_block: Array
    predicted: Array
    confidence: Array
    masked_left: Array

    def __init__(self, memory: Memory, signature: TowerSignature, sizes: Mapping[str, int]) -> None:
        self.by_name = memory.small([signature.tensor(name) for name in _DENOISER_SMALL], sizes)
        self._whole = {name: memory.host(buffer) for name, buffer in self.by_name.items()}

    def use(self, rows: int, *, unmasked: int) -> None:
        """Shows the first rows; the blocks of the others hold `unmasked`, which is no mask."""
        for name, whole in self._whole.items():
            whole[rows:] = unmasked if name == BLOCK else 0
            setattr(self, name, whole[:rows])


class ContextState:
    """The context state of some rows, shared by both towers in place.

    Keys and values have one buffer, which the context tower extends in place. Convolution and SSM
    states have two: the context tower reads one set while it writes the other, and then they change
    places. The denoiser reads the set written last. So no state is ever copied, and two bindings of
    each engine cover all cases.

    Attributes:
        current: Which of the two sets, 0 or 1, holds the state now.
    """

    def __init__(self, towers: Towers, *, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.current = 0
        self._memory = towers.memory
        self._tensors = state_tensors(towers.config, towers.dtype)
        self._rows = rows
        self._used = 0
        sizes = {"B": rows, "T": capacity}
        self._fixed: dict[str, Buffer] = {}
        self._moving: tuple[dict[str, Buffer], dict[str, Buffer]] = ({}, {})
        with Cleanup(self.close) as undo:
            for tensor in self._tensors:
                for buffers in (self._fixed,) if tensor.in_place else self._moving:
                    buffers[tensor.past.name] = self._memory.state(tensor.past, sizes)
            undo.pop_all()

    def reads(self, which: int) -> dict[str, Buffer]:
        """Set `which` under its input names."""
        return {t.past.name: self._buffer(t, which) for t in self._tensors}

    def writes(self, which: int) -> dict[str, Buffer]:
        """The other set under its output names: what a context pass that reads `which` writes."""
        return {t.present.name: self._buffer(t, 1 - which) for t in self._tensors}

    def moved_on(self, end: int) -> None:
        """Notes that the context tower has read a chunk and written keys up to position `end`."""
        self.current = 1 - self.current
        self._used = max(self._used, end)

    def clear(self) -> None:
        """Back to the start of a text.

        Keys are cleared as far as they were written: a masked infinity times zero is not a number.
        """
        for tensor in self._tensors:
            if tensor.in_place:
                written = span_of(tensor.past, "T", self._used)
                self._memory.clear(self._fixed[tensor.past.name], written)
            else:
                self._memory.clear(self._moving[0][tensor.past.name])
        self.current = self._used = 0

    def grow(self, capacity: int) -> None:
        """Moves keys and values into buffers no smaller; nothing may be bound."""
        assert capacity >= self.capacity
        for tensor in self._tensors:
            if tensor.in_place:
                old = self._fixed[tensor.past.name]
                new = self._memory.state(tensor.past, {"B": self._rows, "T": capacity})
                self._memory.copy(
                    old,
                    new,
                    span_of(tensor.past, "T", self._used),
                )
                self._fixed[tensor.past.name] = new
                self._memory.release([old])
        self.capacity = capacity

    def close(self) -> None:
        """Gives the buffers back; nothing may be bound to them any more."""
        sets = (self._fixed, *self._moving)
        buffers = [buffer for one in sets for buffer in one.values()]
        for one in sets:
            one.clear()
        self._memory.release(buffers)

    def _buffer(self, tensor: StateTensor, which: int) -> Buffer:
        buffers = self._fixed if tensor.in_place else self._moving[which]
        return buffers[tensor.past.name]


class Workspace:
    """Buffers and bindings for B rows, reused from request to request; a run may use fewer.

    Bindings are made when they are first needed and kept: of the context engine for each chunk
    width and state set, of the denoiser for each state set. A step in the loop then writes small
    arrays in place and runs a binding, and does nothing else.

    Args:
        capacity: T to begin with.
        largest: Capacity it may grow to.

    Attributes:
        unmasked: A token that is no mask, for the blocks of rows that have nothing to do.
        chunk_length: [N] int64, valid tokens in each used row's chunk.
        past_length: [N] int64, tokens each of them has read.
        candidate_ids: [N,K] int64 and
        candidate_logprobs: [N,K] float32, what the head wrote last.
    """

    chunk_length: Array
    past_length: Array
    candidate_ids: Array
    candidate_logprobs: Array

    def __init__(
        self,
        towers: Towers,
        *,
        rows: int,
        capacity: int,
        largest: int = 0,
    ) -> None:
        self.rows, self.largest = rows, largest
        self.model, self.streams = towers.config, towers.streams
        self.unmasked = int(towers.config.mask_token_id == 0)
        self._towers, self._memory = towers, towers.memory
        context, head = towers.context.signature, towers.context_head.signature
        # Tokens last: what a narrow chunk leaves of them unused is then not copied to a device.
        small = [context.tensor(name) for name in (CHUNK_LENGTH, PAST_LENGTH, TOKENS)]
        best = [head.tensor(name) for name in (CANDIDATE_IDS, CANDIDATE_LOGPROBS)]
        self._buffers: dict[str, Buffer] = {}
        self._denoiser_arrays: DenoiserArrays | None = None
        with Cleanup(self._release) as undo:
            self._buffers |= self._memory.small(small, {"B": rows, "L": MAX_CHUNK})
            self._buffers[HIDDEN] = self._memory.state(context.tensor(HIDDEN), {"B": rows})
            self._buffers |= self._memory.small(best, {"B": rows})
            # the large part last: a refusal of too many rows costs nothing
            self._state = ContextState(towers, rows=rows, capacity=capacity)
            undo.pop_all()
        self._context: dict[tuple[int, int], Binding] = {}
        self._denoiser: dict[int, Binding] = {}
        self._head: dict[int, Binding] = {}
        self.use(rows)

    @property
    def capacity(self) -> int:
        """Positions the keys and values have room for."""
        return self._state.capacity

    def use(self, rows: int) -> None:
        """Takes the first N rows for the next run; the arrays show these alone.

        The others are padding, which computes nothing anybody sees: their chunks hold no valid
        token, so that their state stays as it is, and their blocks no mask.
        """
        assert 0 < rows <= self.rows, "a workspace is chosen for its rows"
        self._used = rows
        for name in (CHUNK_LENGTH, PAST_LENGTH, CANDIDATE_IDS, CANDIDATE_LOGPROBS):
            whole = self._memory.host(self._buffers[name])
            if name in (CHUNK_LENGTH, PAST_LENGTH):
                whole[rows:] = 0
            setattr(self, name, whole[:rows])
        if self._denoiser_arrays is not None:
            self._denoiser_arrays.use(rows, unmasked=self.unmasked)

    def clear(self) -> None:
        """Back to the start of a text."""
        self._state.clear()

    def grow(self, capacity: int) -> None:
        """Moves to buffers for texts as long or longer; the engines must have finished."""
        close_all((*_taken(self._context), *_taken(self._denoiser)))
        self._state.grow(capacity)

    def tokens(self, width: int) -> Array:
        """The context engine's chunk, [N,L] int64, written in place; widths share memory."""
        return self._memory.host(self._chunk(width))[: self._used]

    def denoiser(self, block_size: int) -> DenoiserArrays:
        """The denoiser's small arrays for this block size."""
        arrays = self._denoiser_arrays
        if arrays is None or arrays.block.shape[1] != block_size:
            close_all(_taken(self._denoiser))
            if arrays is not None:
                self._memory.release(tuple(arrays.by_name.values()))
            sizes = {"B": self.rows, "S": block_size}
            arrays = DenoiserArrays(self._memory, self._towers.denoiser.signature, sizes)
            arrays.use(self._used, unmasked=self.unmasked)
            self._denoiser_arrays = arrays
        return arrays

    def extend(self, width: int) -> Event:
        """Lets the context tower read the chunk of this width and move the state on."""
        end = int(self.past_length.max()) + width
        assert end <= self.capacity, "the loop grows the capacity before it writes"
        key = width, self._state.current
        if key not in self._context:
            if len(self._context) >= _MOST_CONTEXT_BINDINGS:
                self._context.pop(next(iter(self._context))).close()
            chunk = {TOKENS: self._chunk(width)}
            self._context[key] = self._bound(self._towers.context, chunk)
        event = self._context[key].run(self.streams.context)
        self._state.moved_on(end)
        return event

    def denoise(self) -> Event:
        """One denoising step on the small arrays and the current state."""
        which = self._state.current
        if which not in self._denoiser:
            assert self._denoiser_arrays is not None, "the small arrays are filled first"
            arrays = self._denoiser_arrays.by_name
            self._denoiser[which] = self._bound(self._towers.denoiser, arrays)
        return self._denoiser[which].run(self.streams.denoiser)

    def head(self) -> Event:
        """The candidates after each row's last token read."""
        if 0 not in self._head:
            self._head[0] = self._bound(self._towers.context_head, {})
        return self._head[0].run(self.streams.context)

    def close(self) -> None:
        """Lets go of bindings, then of buffers; the engines must have finished. Idempotent."""
        bindings = (*_taken(self._context), *_taken(self._denoiser), *_taken(self._head))
        close_all((*bindings, self._release, self._state.close))

    def _release(self) -> None:
        arrays, self._denoiser_arrays = self._denoiser_arrays, None
        denoiser = arrays.by_name.values() if arrays else ()
        self._memory.release((*self._buffers.values(), *denoiser))

    def _chunk(self, width: int) -> Buffer:
        return self._memory.view(self._buffers[TOKENS], (self.rows, width))

    def _bound(self, engine: TowerEngine, own: Mapping[str, Buffer]) -> Binding:
        """An engine on the current state, its own arrays and those of the context tower."""
        which = self._state.current
        every = {
            **self._buffers,
            **own,
            **self._state.reads(which),
            **self._state.writes(which),
        }
        specs = (*engine.signature.inputs, *engine.signature.outputs)
        return engine.bind({spec.name: every[spec.name] for spec in specs})


def _taken(bindings: dict[Any, Binding]) -> list[Callable[[], None]]:
    """What closes bindings, which are forgotten; nothing may be running."""
    closes = [binding.close for binding in bindings.values()]
    bindings.clear()
    return closes


class Workspaces:
    """Lends cleared workspaces of at most `largest` positions; keeps one for the next call."""

    def __init__(self, towers: Towers, largest: int) -> None:
        self._towers = towers
        self._largest = largest
        self._idle: Workspace | None = None
        self._ready: set[int] = set()
        self._working: list[Workspace] = []
        self._closed = False

    @contextmanager
    def lent(self, rows: int, needed: int, *, bound: int | None = None) -> Iterator[Workspace]:
        """Cleared buffers for `rows` rows, or the next bound number; kept unless a run fails.

        `needed` positions to begin with; `bound` row counts, None for the session's choice.
        """
        work = self._take(needed, bound or self._bound(rows))
        with Cleanup(partial(self._give_back, work, sound=False)) as undo:
            work.use(rows)
            yield work
            undo.pop_all()
        self._give_back(work, sound=True)

    def _take(self, needed: int, bound: int) -> Workspace:
        """The last run's if they have the very size: a larger cache would be slower."""
        limits = self._towers.limits
        capacity = limits.capacity if limits else capacity_bucket(needed, self._largest)
        work, self._idle = self._idle, None
        if work is not None and (work.rows, work.capacity) == (bound, capacity):
            with Cleanup(work.close) as undo:
                work.clear()
                undo.pop_all()
        else:
            if work is not None:
                work.close()  # before the new buffers are allocated
            work = Workspace(self._towers, rows=bound, capacity=capacity, largest=self._largest)
        self._working.append(work)
        return work

    def _give_back(self, work: Workspace, *, sound: bool) -> None:
        self._working = [other for other in self._working if other is not work]
        if sound and self._idle is None and not self._closed:
            self._idle = work
        else:
            work.close()

    def warm_up(self, rows: int, run: Callable[[Workspace], None]) -> None:
        """Lets `run` run every pass for a number of rows, to which batches are padded later."""
        count = self._next(rows)
        with self.lent(count, MAX_CHUNK, bound=count) as work:
            run(work)
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
        """Closes all, also those that are lent; idempotent."""
        self._closed = True
        idle, self._idle = self._idle, None
        close_all(work.close for work in (*self._working, *([idle] if idle else [])))
