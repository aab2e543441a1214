"""Tables: one set of cells as aligned text, as HTML and as Markdown."""

from __future__ import annotations

from typing import Any

import pytest

from twotower.report.tables import Column, Table, labelled, number
from twotower.units import format_bytes


@pytest.mark.parametrize(
    ("cell", "spec", "unit", "text"),
    [
        ("as it is", ".1f", " %", "as it is"),
        (98.66, ".1f", " %", "98.7 %"),
        (3, ".2f", "x", "3.00x"),
        (-0.5, "+.1f", "", "-0.5"),
        (7, "", "", "7"),
        (None, ".1f", " %", "-"),
        (True, ".1f", " %", "yes"),
        (False, "", "", "no"),
        (2048, format_bytes, "/s", "2 KiB/s"),
    ],
)
def test_a_cell(cell: str | float | None, spec: Any, unit: str, text: str) -> None:
    assert number(cell, spec, unit) == text


def example() -> Table:
    table = Table(
        ["name", Column("kept", ".1f", " %"), "why"], [("a|b <i>", 98.66, "for two\nlines")]
    )
    table.add("all together", None, "", kind="total")
    return table


def test_text_is_aligned_and_has_no_trailing_blanks() -> None:
    assert Table(["name", Column("kept", ".1f", " %")], [("a", 98.66), ("longer", 5)]).text(
        "  "
    ) == [
        "  name      kept",
        "  a       98.7 %",
        "  longer   5.0 %",
    ]
    assert example().text()[-1] == "all together       -"
    assert Table(["", Column("")], [("a", 1)]).text() == ["a  1"], "no heading, no line of headings"
    assert Table(["a"]).text() == ["a"], "no rows"


def test_html_escapes_its_cells_and_marks_its_rows() -> None:
    html = example().html()
    assert '<th scope="col">kept</th>' in html
    assert '<tr class=""><th scope="row">a|b &lt;i&gt;</th><td>98.7 %</td>' in html
    assert '<td class="words">for two\nlines</td>' in html
    assert '<tr class="total"><th scope="row">all together</th><td>-</td>' in html


def test_sizes_in_html_sort_by_their_bytes() -> None:
    html = Table(["", Column("size", format_bytes)], [("a", 2048), ("b", 900)]).html()
    assert '<td data-value="2048">2 KiB</td>' in html
    assert '<td data-value="900">900 B</td>' in html


def test_markdown_keeps_a_cell_on_its_line_and_in_its_column() -> None:
    assert example().markdown() == [
        "| name | kept | why |",
        "| --- | ---: | --- |",
        "| a\\|b <i> | 98.7 % | for two lines |",
        "| all together | - |  |",
    ]


def test_cells_are_found_in_facts() -> None:
    table = Table(["", Column("kept", ".1f", " %", "retention.value"), Column("lost", of="lost")])
    table.add_facts({"retention": {"value": 98.66}, "lost": 2}, "int4")
    assert table.text()[1:] == ["int4  98.7 %     2"]
    with pytest.raises(KeyError):
        table.add_facts({"retention": {}}, "int4")


def test_a_row_has_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="zip"):
        Table(["a", "b"], [("only one",)])


def test_a_label_stands_before_the_first_of_its_lines() -> None:
    assert labelled("engines", ["one", "two"]) == ["engines     one", "            two"]
    assert labelled("engines", []) == []
