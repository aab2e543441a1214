"""A generation pass by pass: recorded, compared with another, kept in a file, and as a page."""

from twotower.trace.diff import TraceDiff, diff_traces
from twotower.trace.record import (
    Trace,
    TraceStep,
    read_trace,
    record_trace,
    trace_page,
    write_trace,
)

__all__ = [
    "Trace",
    "TraceDiff",
    "TraceStep",
    "diff_traces",
    "read_trace",
    "record_trace",
    "trace_page",
    "write_trace",
]
