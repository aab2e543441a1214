"""A table with three views: aligned text, HTML and Markdown.

`number` writes a figure as a column does, `labelled` lists lines under a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from html import escape
from typing import Any

Cell = str | float | Mapping[str, Any] | None
"""Text, which is shown as it is, a figure, a truth value, or None where there is no figure."""

Spec = str | Callable[[Any], str]


def number(value: Cell, spec: Spec = "", unit: str = "") -> str:
    """A cell as text: `98.7 %` of 98.7, `.1f` and ` %`; `-` for None.

    For figures `spec` is as in `format`, or a function that writes them; `unit` follows, with its
    space if it has one.
    """
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (spec(value) if callable(spec) else f"{value:{spec}}") + unit


@dataclass(frozen=True, slots=True)
class Column:
    """How the cells of a column are written; see `number` for `spec` and `unit`."""

    heading: str
    spec: Spec = ""
    unit: str = ""
    of: str = ""
    """Where a cell is found in the facts of a row, for example `retention.value`."""
    left: bool = False
    """Flush left, for words; numbers stand flush right."""


class Table:
    """Columns and rows; a heading alone is a column of words, flush left."""

    def __init__(
        self, columns: Sequence[Column | str], rows: Iterable[Sequence[Cell]] = ()
    ) -> None:
        self._columns = [Column(c, left=True) if isinstance(c, str) else c for c in columns]
        self._rows: list[list[str]] = []
        self._figures: list[Sequence[Cell]] = []
        self._kinds: list[str] = []
        for row in rows:
            self.add(*row)

    def add(self, *cells: Cell, kind: str = "") -> None:
        """Appends a row with a cell for each column.

        `kind` `total` or `group` sets it off in HTML, where it keeps its place when others are
        sorted.
        """
        pairs = zip(self._columns, cells, strict=True)
        self._rows.append([number(cell, column.spec, column.unit) for column, cell in pairs])
        self._figures.append(cells)
        self._kinds.append(kind)

    def add_facts(self, facts: Mapping[str, Any], *first: Cell, kind: str = "") -> None:
        """Appends a row whose cells after the `first` ones are found in facts."""
        paths = [column.of.split(".") for column in self._columns[len(first) :]]
        found = [reduce(lambda inner, key: inner[key], path, facts) for path in paths]
        self.add(*first, *found, kind=kind)

    def text(self, indent: str = "") -> list[str]:
        """Lines of aligned text; without a heading line where no column has a heading."""
        headings = [column.heading for column in self._columns]
        rows = [headings, *self._rows] if any(headings) else self._rows
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            aligned = [
                cell.ljust(width) if column.left else cell.rjust(width)
                for column, cell, width in zip(self._columns, row, widths, strict=True)
            ]
            lines.append((indent + "  ".join(aligned)).rstrip())
        return lines

    def html(self) -> str:
        """A `<table>` in the style of `report.css`; the first cell of a row is its heading.

        Numbers that a function writes are in the attribute `data-value`, for sorting.
        """
        head = "".join(
            f'<th scope="col"{_css(column)}>{escape(column.heading)}</th>'
            for column in self._columns
        )
        body = []
        for texts, figures, kind in zip(self._rows, self._figures, self._kinds, strict=True):
            cells = [f'<th scope="row">{escape(texts[0])}</th>']
            for column, text, figure in zip(
                self._columns[1:],
                texts[1:],
                figures[1:],
                strict=True,
            ):
                written = callable(column.spec) and isinstance(figure, (int, float))
                value = f' data-value="{figure}"' if written else ""
                cells.append(f"<td{_css(column)}{value}>{escape(text)}</td>")
            body.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
        return (
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )

    def markdown(self) -> list[str]:
        """Lines of a Markdown table, whose cells may hold Markdown."""
        rules = ["---" if column.left else "---:" for column in self._columns]
        rows = [
            [column.heading for column in self._columns],
            rules,
            *self._rows,
        ]
        return [f"| {' | '.join(map(_markdown_cell, row))} |" for row in rows]


def _css(column: Column) -> str:
    return ' class="words"' if column.left else ""


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def labelled(label: str, lines: Iterable[str]) -> list[str]:
    """Lines in a column of their own, with a label before the first of them."""
    return [f"{'' if i else label:<12}{line}" for i, line in enumerate(lines)]
