"""The workspaces of a session: one is kept for the next call, those of running calls and open streams are closed with the session."""

from __future__ import annotations

from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.engines.towers import Towers
from twotower.runtime.schedule import capacity_bucket
from twotower.runtime.workspace import Workspace

__all__ = ["Workspaces"]


class Workspaces:
    """Gives out cleared workspaces and takes them back.

    Args:
        towers: The engines they are bound to.
    """

    def __init__(self, towers: Towers) -> None:
        self._towers = towers
        self._idle: Workspace | None = None
        self._working: list[Workspace] = []
        self._closed = False

    def take(self, rows: int, needed: int, largest: int) -> Workspace:
        """Cleared buffers for `needed` positions, those of the last run if they have the very size: a larger cache would be slower.

        Args:
            rows: N; it has as many, or the next number of rows engines are bound for.
            needed: Positions the run begins with.
            largest: Most positions a session may have.
        """
        limits = self._towers.limits
        capacity = limits.capacity if limits is not None else capacity_bucket(needed, largest)
        work, self._idle = self._idle, None
        bound = next((count for count in self._towers.row_counts if count >= rows), rows)
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

    def relocate(self) -> None:
        """Moves the keys and values of everything that runs to other memory of the same size."""
        for work in self._working:
            work.grow(work.capacity)

    def close(self) -> None:
        """Closes all, also those that are not given back yet; idempotent."""
        self._closed = True
        idle, self._idle = self._idle, None
        close_all(work.close for work in (*self._working, *([idle] if idle else [])))
