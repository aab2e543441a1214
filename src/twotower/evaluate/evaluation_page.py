"""The evaluation for people: lines for a terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

from twotower.evaluate.evaluation import AR, DEFAULT, OTHER, origin_text
from twotower.evaluate.resampling import interval_text
from twotower.report.pages import Card, Page, paragraphs, picture, unfolding_examples
from twotower.report.tables import Column, Table, number


def report_lines(report: dict[str, Any]) -> list[str]:
    """Both tables and the verdict, for a terminal."""
    settings, suite = report["settings"], report["suite"]
    diffusion = settings[DEFAULT]["total"]
    lines = [
        f"{suite['problems']} problems of {len(suite['kinds'])} kinds "
        f"({suite['name']} {suite['sha256'][:12]})",
        "",
        *_settings(report).text(),
        "",
        *_tasks(report).text(),
        "",
        f"diffusion keeps {interval_text(diffusion['retention'])} % of autoregression's "
        f"{settings[AR]['total']['right']} right answers, "
        f"at {interval_text(diffusion['speedup'], 2)} times its speed",
        f"where it loses: {'; '.join(where_it_loses(report)) or 'nowhere'}",
    ]
    if "budget" in report:
        verdict = "kept" if report["budget"]["met"] else "NOT kept"
        lines.append(f"budget of {report['budget']['percent']:g} %: {verdict}")
    return lines


def report_page(report: dict[str, Any], curve: str, *, model: str) -> str:
    """The page of an `Evaluation.report`, with the curve as SVG and the checkpoint's name."""
    suite, bundle = report["suite"], report["bundle"]
    loses = where_it_loses(report)
    verdict = (
        f"Diffusion loses at the default preset on: {'; '.join(loses)}."
        if loses
        else "At the default preset there is no kind of task on which diffusion is slower or "
        "keeps too little."
    )
    return Page(
        title=f"{model}: quality and speed of diffusion against autoregression",
        subtitle=f"bundle {bundle['name']} on {bundle['target']}, {suite['problems']} problems of "
        f"{len(suite['kinds'])} kinds, one at a time, {report['machine']['system']}",
        cards=_cards(report),
        sections={
            "Quality against speed": picture(curve),
            "By task, at the default preset": _tasks(report).html() + paragraphs(verdict),
            "All settings": _settings(report).html(),
            "Solved by autoregression, lost by diffusion": unfolding_examples(
                report["lost"],
                "diffusion",
                "None: every problem that autoregression solved, diffusion solved too.",
            ),
        },
        method=_method(report),
        data=report,
    ).html()


def preset_lines(presets: dict[str, Any]) -> list[str]:
    """What `tune` chose: each preset's setting, and its figures on both halves of the problems."""
    columns: list[Column | str] = [
        "preset",
        Column("threshold", "g", of="config.confidence_threshold"),
        Column("steps", of="config.steps_per_block"),
    ]
    for half, where in (("choice", "chosen on"), ("check", "checked on")):
        columns += [
            Column(
                f"{where}: kept",
                ".1f",
                " %",
                f"{half}.retention.value",
            ),
            Column("speed", ".2f", "x", f"{half}.speedup.value"),
        ]
    table = Table(columns)
    for name, facts in presets.items():
        table.add_facts(facts, name)
    return table.text()


def where_it_loses(report: dict[str, Any]) -> list[str]:
    """Kinds of task on which the default preset is slower, or keeps less than was asked for.

    Without a budget 98.7 % of autoregression's right answers are asked for.
    """
    wanted = report.get("budget", {}).get("percent", 98.7)
    out = []
    for kind, facts in report["settings"][DEFAULT]["kinds"].items():
        retention, speedup = facts["retention"]["value"], facts["speedup"]["value"]
        reasons = []
        if retention is not None and retention < wanted:
            reasons.append(f"keeps {retention:.1f} %")
        if speedup is not None and speedup < 1:
            reasons.append(f"runs at {speedup:.2f}x")
        if reasons:
            out.append(f"{kind} ({', '.join(reasons)})")
    return out


def _cards(report: dict[str, Any]) -> list[Card]:
    ar, diffusion = report["settings"][AR]["total"], report["settings"][DEFAULT]["total"]
    kept, faster = diffusion["retention"], diffusion["speedup"]
    budget = report.get("budget", {})
    met = budget["met"] if budget.get("setting") == DEFAULT else None

    def of_ar(value: float, spec: str, unit: str = "") -> str:
        return f"autoregression {number(value, spec, unit)}"

    cards = [
        Card(
            "quality kept",
            number(kept["value"], ".1f", " %"),
            f"95 % interval {interval_text(kept)}",
            met,
        ),
        Card(
            "faster than autoregression",
            number(faster["value"], ".2f", "x"),
            f"95 % interval {interval_text(faster, 2)}",
        ),
        Card(
            "tokens a pass",
            number(diffusion["tokens_per_pass"], ".2f"),
            f"{number(diffusion['passes_per_block'], '.2f')} passes a block",
        ),
        Card(
            "right answers",
            number(diffusion["exact"]["value"], ".1f", " %"),
            of_ar(ar["exact"]["value"], ".1f", " %"),
        ),
        Card(
            "tokens a second",
            number(diffusion["tokens_per_second"], ".0f"),
            of_ar(ar["tokens_per_second"], ".0f"),
        ),
    ]
    if OTHER in report["settings"]:
        change = report["other_to_default"]["total"]
        cards.append(
            Card(
                f"{report['other']['name']} keeps",
                number(
                    report["settings"][OTHER]["total"]["retention"]["value"],
                    ".1f",
                    " %",
                ),
                f"{number(change['retention']['value'], '.1f', ' %')} of this bundle's, "
                f"{number(change['speedup']['value'], '.2f', 'x')} its speed",
            )
        )
    return cards


_SPEED = partial(interval_text, digits=2, unit="x")
_PASSES = (
    Column("passes/block", ".2f", of="passes_per_block"),
    Column("tokens/pass", ".2f", of="tokens_per_pass"),
)


def _tasks(report: dict[str, Any]) -> Table:
    """A row for each kind of task, for lengths within and beyond the trained ones, and for all."""
    ar, diffusion = report["settings"][AR], report["settings"][DEFAULT]
    table = Table(
        [
            "task",
            Column("problems", of="problems"),
            Column("AR right", ".1f", " %", "ar.exact.value"),
            Column("diffusion right", ".1f", " %", "exact.value"),
            Column("kept", ".1f", " %", "retention.value"),
            Column("speed", ".2f", "x", "speedup.value"),
            *_PASSES,
            Column("tokens", ".0f", of="tokens_each"),
        ]
    )

    def add(
        name: str,
        before: dict[str, Any],
        after: dict[str, Any],
        kind: str = "",
    ) -> None:
        each = after["tokens"] / after["problems"]
        table.add_facts(
            {**after, "ar": before, "tokens_each": each},
            name,
            kind=kind,
        )

    for task, facts in diffusion["kinds"].items():
        add(task, ar["kinds"][task], facts)
    names = {"in": "of trained lengths", "out": "beyond trained lengths"}
    for length, facts in diffusion["lengths"].items():
        add(names[length], ar["lengths"][length], facts, "group")
    add("all", ar["total"], diffusion["total"], "total")
    return table


def _settings(report: dict[str, Any]) -> Table:
    """A row for autoregression, the default preset, the other bundle, and each of the sweep."""
    table = Table(
        [
            "threshold",
            Column("steps"),
            Column("right", ".1f", " %", "exact.value"),
            Column("kept, 95 % interval", interval_text, of="retention"),
            Column("speed, 95 % interval", _SPEED, of="speedup"),
            *_PASSES,
            Column("tokens/s", ".0f", of="tokens_per_second"),
            Column("loops", of="degenerate"),
        ]
    )
    whose = {DEFAULT: " (default)", OTHER: " (other bundle)"}
    for name, setting in report["settings"].items():
        config = setting["config"]
        threshold = f"{config['confidence_threshold']:g}{whose.get(name, '')}"
        first = ("autoregression", None) if name == AR else (threshold, config["steps_per_block"])
        kind = "total" if name == DEFAULT else ""
        table.add_facts(setting["total"], *first, kind=kind)
    return table


def _method(report: dict[str, Any]) -> str:
    scores = report.get("likelihood")
    sentences = [
        "Every problem is answered by every setting in turn, one request at a time, so that "
        "system noise affects all equally; the first two answers of each are not counted. "
        "Times include reading the prompt. A right answer is the expected text and nothing else; "
        "a loop is a text that ends in the same up to 16 tokens four times over. Intervals are "
        "percentiles of 2000 paired bootstrap draws of the problems.",
        origin_text(report),
    ]
    if scores and scores["nats_per_token"] is not None:
        sentences.append(
            f"The context tower gives the right answers {scores['nats_per_token']:.4f} nats a "
            f"token (perplexity {scores['perplexity']:.3f}); {scores['greedy']:.1f} % of them are "
            "its own first choice throughout."
        )
    return " ".join(sentences)
