"""What a rule is, and what it says of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import onnx

from twotower.graph_lint.view import GraphView

BUILT = "tested with TensorRT for RTX 1.7.1"
"""The source of a reason that a test of this project repeats with the library itself."""

Complaint = tuple[str, str]
"""Where (an operator or a tensor) and what was found there."""

Find = Callable[[GraphView], Iterator[Complaint]]
"""Finds the places of a graph where a rule does not hold."""

Check = Callable[[GraphView, onnx.NodeProto], str | None]
"""What is wrong with an operator, or None."""


class Severity(StrEnum):
    """An error is a graph TensorRT refuses or computes wrongly, a note one that costs something."""

    ERROR = "error"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing a graph must not, or should not, have.

    `id` is kebab case, for good; `source` is where the reason comes from; errors (`severity`) stop
    an export and a build.
    """

    id: str
    subject: str
    avoid: str
    reason: str
    instead: str
    source: str
    severity: Severity = Severity.ERROR


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a rule does not hold."""

    rule: Rule
    where: str
    found: str

    def __str__(self) -> str:
        return f"{self.rule.severity} {self.rule.id}: {self.where}: {self.found}"

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {
            "rule": self.rule.id,
            "severity": self.rule.severity.value,
            "where": self.where,
            "found": self.found,
        }


class Rules(list[tuple[Rule, Find]]):
    """Rules with what finds their places; a check stands below the rule it is for."""

    def of_graph(self, rule: Rule) -> Callable[[Find], Find]:
        """Decorates what looks at a whole graph."""

        def register(find: Find) -> Find:
            self.append((rule, find))
            return find

        return register

    def of_operators(
        self,
        op_types: tuple[str, ...],
        rule: Rule,
    ) -> Callable[[Check], Check]:
        """Decorates what looks at one operator of some types."""

        def register(check: Check) -> Check:
            self.append((rule, each(op_types, check)))
            return check

        return register


def each(op_types: tuple[str, ...], check: Check) -> Find:
    """Asks every operator of some types what is wrong with it, if anything."""

    def find(view: GraphView) -> Iterator[Complaint]:
        for node in view.nodes:
            if node.op_type in op_types and (found := check(view, node)):
                yield where(node), found

    return find


def where(node: onnx.NodeProto) -> str:
    """An operator's name, or what it makes if it has none."""
    return node.name or f"{node.op_type} that makes {', '.join(node.output)}"
