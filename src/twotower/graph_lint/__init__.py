"""What a graph must not contain, because TensorRT refuses it or silently computes something else.

A table of rules, each with its reason and the source of that reason; docs/graph-rules.md shows it.
ONNX Runtime computes most of these forms as ONNX says, so no comparison with it finds them.
"""

from twotower.graph_lint.lint import RULES, explained, lint, require_clean, rules_table
from twotower.graph_lint.rule import Finding, Rule, Severity

__all__ = [
    "RULES",
    "Finding",
    "Rule",
    "Severity",
    "explained",
    "lint",
    "require_clean",
    "rules_table",
]
