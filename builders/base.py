"""What a builder is asked for and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from twotower.bundle import Bundle, EngineRecord

__all__ = ["BuildConfig", "EngineBuilder", "Report"]

Report = Callable[[str, int, int], None]
"""Called with (what is being done, done, in all); the numbers are bytes or steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """Options of one build.

    Attributes:
        force: Build again although a fitting engine is there.
    """

    force: bool = False


class EngineBuilder(Protocol):
    """Turns a bundle's graphs into the engines of one target."""

    def library(self) -> dict[str, str]:
        """Name and version of the library the engines are tied to."""
        ...

    def needed_bytes(self, bundle: Bundle) -> int:
        """Disk space the engines will take."""
        ...

    def build(self, bundle: Bundle, folder: Path, report: Report) -> EngineRecord:
        """Writes the engines into an empty folder and describes them; publishing the folder is the caller's part."""
        ...
