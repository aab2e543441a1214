"""The workspaces of a session: one is kept for the next call, those of running calls and open streams are closed with the session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.engines.towers import Towers
from twotower.runtime.schedule import capacity_bucket
from twotower.runtime.workspace import Workspace
from twotower.spec import MAX_CHUNK

__all__ = ["Workspaces"]


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
