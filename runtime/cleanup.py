"""Letting go of many things when some refuse: all are tried, and the first failure is what is seen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

__all__ = ["Cleanup", "close_all"]

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
    """What is to be done at the end of a `with` statement, the last thing first.

    Like `contextlib.ExitStack`, but for which failure is seen: after an error on a GPU every later
    call fails too, and what the clean-up says must not hide what happened. A failure in the body
    goes on as it is, and those of the clean-up are logged; of several in the clean-up alone the
    first is raised.

    Args:
        actions: What is to be done, as by `callback`.
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
        if error is None or isinstance(
            error,
            GeneratorExit,
        ):  # an iterator that is let go of early is no failure
            close_all(actions)
        else:
            _try_all(actions)


def _try_all(actions: Iterable[Action]) -> None:
    for action in actions:
        try:
            action()
        except Exception:
            logger.info("clean-up after a failure failed as well", exc_info=True)
