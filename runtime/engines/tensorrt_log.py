"""What a TensorRT library says: in Python's log, and its last lines for the text of an error."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

__all__ = ["LibraryLog", "library_log"]

logger = logging.getLogger(__name__)

_KEPT_LINES = 8


class LibraryLog:
    """The lines of one library. It has one logger a process: the first it is given.

    Args:
        trt: The library's module.

    Attributes:
        logger: What the library is given.
    """

    def __init__(self, trt: Any) -> None:
        self._said: deque[tuple[bool, str]] = deque(maxlen=_KEPT_LINES)
        self.logger = _make_logger(trt, self._said)

    def drain(self, *, errors: bool = False) -> str:
        """What was said last, which is then forgotten: warnings and worse, or errors alone."""
        said: list[str] = []
        while self._said:  # one by one: the library's own threads may be adding lines
            error, line = self._said.popleft()
            if error or not errors:
                said.append(line)
        return "; ".join(said)


def library_log(trt: Any) -> LibraryLog:
    """The log of a library, one for all sessions of a process: a second logger would hear nothing."""
    name = str(trt.__name__)
    if name not in _LOGS:
        _LOGS[name] = LibraryLog(trt)
    return _LOGS[name]


_LOGS: dict[str, LibraryLog] = {}


def _make_logger(trt: Any, said: deque[tuple[bool, str]]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Passes lines on."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            serious = severity.value <= trt.ILogger.Severity.WARNING.value
            error = severity.value <= trt.ILogger.Severity.ERROR.value
            logger.log(logging.INFO if serious else logging.DEBUG, "%s: %s", severity.name, message)
            if serious:
                said.append((error, " ".join(message.split())))

    return Logger()
