"""Takes private text out of a report: names of people and machines, and folders of their disks."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SHORTEST_NAME = 4
"""Shorter names of machines or people are words of their own too often."""

_COMMON = {"localhost", "root", "user", "ubuntu", "admin"}
_HOMES = re.compile(r"(/home/|/Users/|\\Users\\)[^/\\\s:'\"]+")


class Scrubber:
    """Replaces private text, and `paths` given with a word each, by words in square brackets."""

    def __init__(self, paths: Mapping[Path, str] | None = None) -> None:
        places = {
            Path(tempfile.gettempdir()): "[tmp]",
            Path.home(): "[home]",
            Path(sys.prefix): "[environment]",
            Path.cwd(): "[here]",
            **(paths or {}),
        }
        texts = {
            str(form): word for path, word in places.items() for form in (path, path.resolve())
        }
        # The longest first: a folder inside another keeps its own word. "/" is in every path.
        ordered = sorted(
            (text for text in texts if len(text) > 1),
            key=len,
            reverse=True,
        )
        self._words = {text: texts[text] for text in ordered}
        self._places = re.compile("|".join(re.escape(text) for text in ordered))
        people = [os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME")]
        names = {
            platform.node(): "[host]",
            platform.node().split(".")[0]: "[host]",
            **dict.fromkeys(people, "[user]"),
        }
        self._names = [
            (re.compile(rf"(?<!\w){re.escape(name)}(?!\w)"), word)
            for name, word in names.items()
            if len(name) >= _SHORTEST_NAME and name not in _COMMON
        ]

    def text(self, text: str) -> str:
        """A text without what is private."""
        out = self._places.sub(lambda found: self._words[found[0]], text)
        out = _HOMES.sub("[home]", out)
        for name, word in self._names:
            out = name.sub(word, out)
        return out

    def data(self, value: Any) -> Any:
        """Plain data with every text in it scrubbed, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.data(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(item) for item in value]
        return value
