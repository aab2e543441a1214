"""A generation pass by pass: recorded, compared with another, kept in a file, and as a page."""

from twotower.trace.diff import TraceDiff, diff_traces
from twotower.trace.file import read_trace, trace_page, write_trace
from twotower.trace.record import Trace, TraceStep, record_trace

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
