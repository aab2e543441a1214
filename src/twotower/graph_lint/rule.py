"""What a rule is, and what it says of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

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
    an export and a build; `built_only` rules hold only once axes were fixed for a build.
    """

    id: str
    subject: str
    avoid: str
    reason: str
    instead: str
    source: str
    severity: Severity = Severity.ERROR
    built_only: bool = False


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

    def add(self, rule: Rule, find: Find) -> None:
        """A rule with a check that other rules use, too."""
        self.append((rule, find))

    def of_graph(self, rule: Rule) -> Callable[[Find], Find]:
        """Decorates what looks at a whole graph."""

        def register(find: Find) -> Find:
            self.add(rule, find)
            return find

        return register

    def of_operator(self, op_types: tuple[str, ...] | str, rule: Rule) -> Callable[[Check], Check]:
        """Decorates what looks at one operator of some types."""

        def register(check: Check) -> Check:
            self.add(rule, each(op_types, check))
            return check

        return register


def each(op_types: tuple[str, ...] | str, check: Check) -> Find:
    """Asks every operator of some types, whatever its domain: TensorRT does not read it either."""
    wanted = (op_types,) if isinstance(op_types, str) else op_types

    def find(view: GraphView) -> Iterator[Complaint]:
        for node in view.nodes:
            if node.op_type in wanted and (found := check(view, node)):
                yield where(node), found

    return find


def absent(op_types: tuple[str, ...] | str) -> Find:
    """Finds every operator of some types."""
    return each(op_types, lambda view, node: f"operator {node.op_type}")


def attribute(op_types: tuple[str, ...] | str, name: str, *allowed: Any) -> Find:
    """Finds operators whose attribute is none of `allowed`, the first of which is its default."""

    def check(view: GraphView, node: onnx.NodeProto) -> str | None:
        value = view.attribute(node, name, allowed[0])
        if value in allowed:
            return None
        return f"{name} = {value}"

    return each(op_types, check)


def where(node: onnx.NodeProto) -> str:
    """An operator's name, or what it makes if it has none."""
    return node.name or f"{node.op_type} that makes {', '.join(node.output)}"
