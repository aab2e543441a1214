"""Whether what runs here computes the model, and how: reference loop, canary checks of `twotower doctor`, traces of every pass."""

from twotower.evaluate.answer_check import KEPT_BY, check_answer, known_answer_of, setting_of
from twotower.evaluate.canary import CheckResult, check_bundle, check_chain
from twotower.evaluate.execution_check import check_execution
from twotower.evaluate.trace import Trace, TraceStep, record_trace
from twotower.evaluate.trace_diff import TraceDiff, diff_traces
from twotower.evaluate.trace_file import read_trace, write_trace
from twotower.evaluate.trace_page import trace_page

__all__ = [
    "KEPT_BY",
    "CheckResult",
    "Trace",
    "TraceDiff",
    "TraceStep",
    "check_answer",
    "check_bundle",
    "check_chain",
    "check_execution",
    "diff_traces",
    "known_answer_of",
    "read_trace",
    "record_trace",
    "setting_of",
    "trace_page",
    "write_trace",
]
