"""What a rule is, and what it says of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from twotower.graph_lint.view import GraphView

__all__ = ["Complaint", "Finding", "Rule", "Severity"]

Complaint = tuple[str, str]
"""Where (an operator or a tensor) and what was found there."""


class Severity(StrEnum):
    """How bad it is: an error is a graph TensorRT refuses or computes wrongly, a note one that costs something."""

    ERROR = "error"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing a graph must not, or should not, have.

    Attributes:
        id: Its name, kebab case, for good.
        subject: The operators or tensors it looks at.
        avoid: What must not be.
        reason: What happens otherwise.
        instead: What to write.
        source: Where the reason comes from.
        find: Finds the places.
        severity: Errors stop an export.
        built_only: It holds for a graph whose axes were fixed for a build, not for an exported one.
    """

    id: str
    subject: str
    avoid: str
    reason: str
    instead: str
    source: str
    find: Callable[[GraphView], Iterator[Complaint]]
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
        return {"rule": self.rule.id, "severity": self.rule.severity.value, "where": self.where, "found": self.found}
