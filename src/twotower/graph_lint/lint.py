"""Every rule held against a graph."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from twotower.errors import TwoTowerError
from twotower.graph_lint import rules
from twotower.graph_lint.rule import Finding, Rule, Severity
from twotower.graph_lint.view import GraphView

RULES: tuple[Rule, ...] = tuple(rule for rule, _ in rules.RULES)
"""Every rule."""

_SHOWN = 5  # findings of one rule an error names one by one: 52 layers share their faults


def lint(model: onnx.ModelProto, *, fixed: bool = False) -> tuple[Finding, ...]:
    """Every place of a graph (weights may be absent) where a rule does not hold, errors first.

    `fixed` says that its axes were fixed for a build.
    """
    view = GraphView(model, fixed=fixed)
    found = [Finding(rule, where, what) for rule, find in rules.RULES for where, what in find(view)]
    return tuple(sorted(found, key=lambda f: f.rule.severity is Severity.NOTE))


def require_clean(
    model: onnx.ModelProto,
    name: str,
    *,
    error: type[TwoTowerError],
    do: str,
    fixed: bool = False,
) -> tuple[Finding, ...]:
    """The notes on a graph that has no errors; else raises `error` with every finding.

    `name` is what to call the graph, `do` what the user can do; `fixed` as in `lint`.
    """
    findings = lint(model, fixed=fixed)
    if errors := [f for f in findings if f.rule.severity is Severity.ERROR]:
        raise error(
            f"{name} has forms that TensorRT refuses or computes wrongly",
            found="; ".join(explained(errors)),
            do=do,
        )
    return findings


def explained(findings: Iterable[Finding]) -> list[str]:
    """One line a rule: what is wrong and where, why it matters, and what to write."""
    by_rule: dict[str, list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule.id, []).append(finding)
    lines = []
    for group in by_rule.values():
        rule, more = group[0].rule, len(group) - _SHOWN
        places = ", ".join(f"{f.where}: {f.found}" for f in group[:_SHOWN])
        if more > 0:
            places += f" and {more} more"
        why = f"({rule.reason}; instead: {rule.instead})"
        lines.append(f"{rule.severity} {rule.id}: {places} {why}")
    return lines


def rules_table() -> str:
    """All rules as a Markdown table."""
    rows = [
        "| rule | looks at | must not be | because | write | source |",
        "|---|---|---|---|---|---|",
    ]
    for rule in RULES:
        kind = " (note)" if rule.severity is Severity.NOTE else ""
        cells = (rule.subject, rule.avoid, rule.reason, rule.instead, rule.source)
        rows.append(f"| `{rule.id}`{kind} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
