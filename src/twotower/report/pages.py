"""An HTML page that stands alone: its frame, cards with figures, and texts with marked words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from importlib import resources
from string import Template
from typing import Any


@dataclass(frozen=True, slots=True)
class Card:
    """One figure, what it is, and a remark; `met` says whether it is what was asked for."""

    label: str
    figure: str
    note: str
    met: bool | None = None

    def html(self) -> str:
        parts = (("figure", self.figure), ("label", self.label), ("note", self.note))
        shown = "".join(f'<div class="{css}">{escape(text)}</div>' for css, text in parts)
        css = {None: "", True: " good", False: " bad"}[self.met]
        return f'<div class="card{css}">{shown}</div>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The parts of a page.

    Title, subtitle and method are text; the verdict (above the cards) and the sections, by heading,
    are HTML; the page holds `data`, the report it shows, as JSON.
    """

    title: str
    subtitle: str
    method: str
    verdict: str = ""
    cards: Sequence[Card]
    sections: Mapping[str, str]
    data: Mapping[str, Any]

    def html(self) -> str:
        """The page with its style and the sorting of its tables, in one file."""
        folder = resources.files("twotower.report")
        frame, style, sort = (
            (folder / file).read_text(encoding="utf-8")
            for file in ("page.html", "report.css", "sort.js")
        )
        sections = (f"<h2>{escape(name)}</h2>\n{part}" for name, part in self.sections.items())
        return Template(frame).substitute(
            title=escape(self.title),
            subtitle=escape(self.subtitle),
            verdict=self.verdict,
            cards="".join(card.html() for card in self.cards),
            sections="\n".join(sections),
            method=escape(self.method),
            data=script_data(self.data),
            style=style,
            sort=sort,
        )


def script_data(data: Any) -> str:
    """Data as JSON for a script element, without the "</" and "<!--" that would move its end."""
    return json.dumps(data).replace("<", "\\u003c")


def paragraphs(*texts: str) -> str:
    """Texts as paragraphs."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def picture(svg: str) -> str:
    """A picture in its frame."""
    return f'<div class="picture">{svg}</div>'


def unfolding_examples(lost: Sequence[Mapping[str, str]], who: str, otherwise: str) -> str:
    """Problems that were lost, each with its prompt, the right answer and what `who` wrote.

    `lost` has `kind`, `prompt`, `answer` and, under `diffusion`, the text; `otherwise` is said if
    empty.
    """
    examples = (
        f"<details><summary><b>{escape(x['kind'])}</b> {escape(x['prompt'][:110])}</summary>"
        f"<pre>{escape(x['prompt'])}</pre>"
        f"<p>right</p><pre>{_marked(x['answer'], x['diffusion'])}</pre>"
        f"<p>{escape(who)} wrote</p><pre>{_marked(x['diffusion'], x['answer'])}</pre></details>"
        for x in lost
    )
    return "".join(examples) or paragraphs(otherwise)


def _marked(text: str, other: str) -> str:
    """The words of `text` that `other` does not have at that place of its wording, marked."""
    words = text.split()
    blocks = SequenceMatcher(None, words, other.split(), autojunk=False).get_matching_blocks()
    common = {i for block in blocks for i in range(block.a, block.a + block.size)}
    return " ".join(
        escape(word) if i in common else f"<mark>{escape(word)}</mark>"
        for i, word in enumerate(words)
    )
