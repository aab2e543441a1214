"""Clean-up in which everything is tried, and which waits while a pass is at work."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from threading import RLock, get_ident
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

Action = Callable[[], object]


def close_all(actions: Iterable[Action]) -> None:
    """Does every one of `actions` in order, whatever fails, and then raises the first failure."""
    rest = iter(actions)
    for action in rest:
        try:
            action()
        except BaseException:
            _try_all(rest)
            raise


class Cleanup:
    """Actions at the end of a `with` statement, last first, like `contextlib.ExitStack`.

    The difference is which failure is seen: after a GPU error every later call fails too. A failure
    in the body is raised and those of the clean-up are logged; of several in the clean-up alone the
    first is raised.
    """

    def __init__(self, *actions: Action) -> None:
        self._actions = list(actions)

    def callback(self, action: Action) -> None:
        """Adds something to do."""
        self._actions.append(action)

    def pop_all(self) -> None:
        """Forgets everything: what was made is kept."""
        self._actions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        actions = reversed(self._actions)
        # an iterator that is let go of early is no failure
        if error is None or isinstance(error, GeneratorExit):
            close_all(actions)
        else:
            _try_all(actions)


def _try_all(actions: Iterable[Action]) -> None:
    for action in actions:
        try:
            action()
        except Exception:
            logger.info("clean-up after a failure failed as well", exc_info=True)


class SessionLock:
    """A lock for a `with` statement, which the thread that holds it may take again."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._depth = 0
        self._owner = 0  # a thread's number, which is never 0
        self._later: deque[Callable[[], object]] = deque()

    def __enter__(self) -> Self:
        self._lock.acquire()
        self._owner = get_ident()
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._depth == 1:
                self._do_later()
        finally:  # an interrupt may come at any point, and the session is not to stay taken
            self._leave()
        self._catch_up()

    def at_the_end(self, action: Callable[[], object]) -> None:
        """Runs an action when no turn is taken: at once, or at the turn's end, by its owner.

        An iterator can be dropped in any thread at any point, even by Python's collector inside a
        pass or while its thread holds a lock this turn's owner needs. So nobody waits here, and
        failures are logged: they belong to another call.
        """
        self._later.append(action)
        self._catch_up()

    def _catch_up(self) -> None:
        """Does what was left, unless a turn is taken: its owner will look after it has left."""
        while self._later and self._owner != get_ident() and self._lock.acquire(blocking=False):
            self._owner = get_ident()
            self._depth += 1
            try:
                self._do_later()
            finally:
                self._leave()

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = 0
        self._lock.release()

    def _do_later(self) -> None:
        while self._later:
            action = self._later.popleft()
            try:
                action()
            except Exception:
                logger.warning("an iterator that was let go of could not be closed", exc_info=True)
