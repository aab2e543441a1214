"""What an exported graph must not contain, because TensorRT refuses it or, worse, computes something else without a word.

A table of rules, each with its reason and the source of that reason; docs/graph-rules.md is written from it. ONNX Runtime
computes most of these forms correctly, so no comparison with it finds them.
"""

from __future__ import annotations

import onnx

from twotower.graph_lint.attention import ATTENTION_RULES
from twotower.graph_lint.operators import OPERATOR_RULES
from twotower.graph_lint.rule import Finding, Rule, Severity
from twotower.graph_lint.tensors import TENSOR_RULES
from twotower.graph_lint.view import GraphView

__all__ = ["RULES", "Finding", "Rule", "Severity", "lint", "rules_table"]

RULES: tuple[Rule, ...] = (*OPERATOR_RULES, *ATTENTION_RULES, *TENSOR_RULES)
"""Every rule."""


def lint(model: onnx.ModelProto, *, fixed: bool = False) -> tuple[Finding, ...]:
    """Every place of a graph where a rule does not hold, errors first.

    Args:
        model: The graph; its external weights need not be there.
        fixed: Whether its axes were fixed for a build; some rules hold only then.
    """
    view = GraphView(model, fixed=fixed)
    found = [Finding(rule, where, what) for rule in RULES if fixed or not rule.built_only for where, what in rule.find(view)]
    return tuple(sorted(found, key=lambda f: f.rule.severity is Severity.NOTE))


def rules_table() -> str:
    """All rules as a Markdown table."""
    rows = [
        "| rule | looks at | must not be | because | write | source |",
        "|---|---|---|---|---|---|",
        *(f"| `{r.id}` ({r.severity}) | {r.subject} | {r.avoid} | {r.reason} | {r.instead} | {r.source} |" for r in RULES),
    ]
    return "\n".join(rows) + "\n"
