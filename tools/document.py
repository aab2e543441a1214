"""Documents with a part that a measurement writes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_between", "write_whole"]


def write_between(document: Path, marks: tuple[str, str], text: str) -> None:
    """Puts text between the document's two marks.

    Raises:
        SystemExit: the document has no such marks.
    """
    begin, end = marks
    before, _, rest = document.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{document} has no place for this: it needs the lines\n{begin}\n{end}")
    write_whole(document, f"{before}{begin}\n{text}\n{end}{after}")


def write_whole(file: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
