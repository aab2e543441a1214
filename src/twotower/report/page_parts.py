"""Parts of an HTML page that stands alone: its frame, tables, cards with figures, and texts with marked words."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from string import Template
from typing import Any

__all__ = ["card", "examples", "number", "page", "table"]


def page(name: str, report: dict[str, Any], **parts: str) -> str:
    """A page of this folder with its parts, its style, the sorting of its tables, and the report as data."""
    pages = resources.files("twotower.report")
    style, sort = ((pages / file).read_text(encoding="utf-8") for file in ("report.css", "sort.js"))
    template = Template((pages / name).read_text(encoding="utf-8"))
    return template.substitute(
        parts, style=style, sort=sort, data=json.dumps(report).replace("<", "\\u003c")
    )


def card(label: str, figure: str, note: str, css: str = "") -> str:
    """One figure with what it is and what is to be said of it; `css` is ` good`, ` bad` or nothing."""
    shown = f'<div class="figure">{escape(figure)}</div><div class="label">{escape(label)}</div><div class="note">{escape(note)}</div>'
    return f'<div class="card{css}">{shown}</div>'


def table(head: tuple[str, ...], rows: list[tuple[str, list[str]]]) -> str:
    """A table; a row is its class (` total` and ` group` rows stay where they are) and its cells."""
    titles = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "".join(
        f'<tr class="{css}"><th scope="row">{escape(cells[0])}</th>{"".join(f"<td>{escape(c)}</td>" for c in cells[1:])}</tr>'
        for css, cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def examples(lost: list[dict[str, str]], who: str = "diffusion") -> list[str]:
    """Problems that were lost, each to be unfolded: the prompt, the right answer and what was written, differing words marked."""
    return [
        f"<details><summary><b>{escape(x['kind'])}</b> {escape(x['prompt'][:110])}</summary>"
        f"<pre>{escape(x['prompt'])}</pre><p>right</p><pre>{_marked(x['answer'], x['diffusion'])}</pre>"
        f"<p>{escape(who)} wrote</p><pre>{_marked(x['diffusion'], x['answer'])}</pre></details>"
        for x in lost
    ]


def _marked(text: str, other: str) -> str:
    """The words of `text` that stand elsewhere, or not at all, in `other`, marked."""
    theirs = other.split()
    words = text.split()
    return " ".join(
        f"<mark>{escape(w)}</mark>" if i >= len(theirs) or theirs[i] != w else escape(w)
        for i, w in enumerate(words)
    )


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"
