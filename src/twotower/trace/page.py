"""A trace as one HTML file that plays it: no network, no other files, every word of the model shown as text."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources

from twotower.trace.record import Trace

__all__ = ["trace_page"]

_PLACE = "{{trace}}"


def trace_page(trace: Trace) -> str:
    """The page; its script reads the trace from a JSON element and shows strings by `textContent` only."""
    before, _, after = (resources.files("twotower.trace") / "trace.html").read_text(encoding="utf-8").partition(_PLACE)
    # Not only "</": a "<!--" inside a script element would change where the browser sees the element's end.
    return before + json.dumps(asdict(trace)).replace("<", "\\u003c") + after
