"""The page of a device in Markdown, made from the results of a report and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from twotower.doctor.sections import OK
from twotower.report.tables import Table

MACHINE = "machine"
"""The section whose facts stand at the head of the page."""


def page_name(device: str) -> str:
    """The file of a device: its name in lower case, words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower())) + ".md"


def device_page(results: Mapping[str, Any]) -> str:
    """The page of what `results.json` holds.

    A section shows its `summary` (sentences) and its `tables`, and if it is not "ok" also why.
    """
    sections: Mapping[str, Any] = results["sections"]
    lines = [
        f"# {results['device']}",
        "",
        f"Written by `{results['made_by']}` of twotower {results['twotower']} on "
        f"{results['date']}, from its results alone; nothing here is typed by hand.",
        "",
    ]
    facts = sections.get(MACHINE, {}).get("answers", {}).get("facts", {})
    if facts:
        lines += [*_table(("", ""), list(facts.items())), ""]
    overview = []
    for name, result in sections.items():
        state = OK if result["state"] == OK else f"**{result['state']}**"
        overview.append((name, result["question"], state, result["seconds"]))
    head = ("section", "question", "state", "seconds")
    lines += [
        "## Sections",
        "",
        *_table(head, overview),
        "",
    ]
    for name, result in sections.items():
        lines += _section(name, result)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, result: Mapping[str, Any]) -> list[str]:
    """A section's heading and body; nothing for one that has nothing to show."""
    answers: Mapping[str, Any] = result["answers"]
    body = [f"- {' '.join(line.split())}" for line in answers.get("summary", [])]
    why = answers.get("reason") or answers.get("error")
    if result["state"] != OK and why:
        body.append(f"- {result['state']}: {' '.join(str(why).split())}")
    body += [""] if body else []
    for table in answers.get("tables", []):
        body += [
            f"### {table['title']}",
            "",
            *_table(table["head"], table["rows"]),
            "",
        ]
        body += [table["note"], ""] if table.get("note") else []
    if result.get("last_words"):
        body += ["```text", *result["last_words"], "```", ""]
    if not body:
        return []
    return [f"## {name}", "", *body]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return Table(head, [[_cell(cell) for cell in row] for row in rows]).markdown()


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
