"""The evaluation for people: lines for a terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from typing import Any

from twotower.evaluate.evaluation import AR, DEFAULT, OTHER, interval_text
from twotower.report.pages import Card, Page, paragraphs, picture, unfolding_examples
from twotower.report.tables import Column, Table, number

__all__ = ["preset_lines", "report_lines", "report_page", "where_it_loses"]


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
    """The page.

    Args:
        report: `Evaluation.report`.
        curve: The picture as SVG.
        model: The checkpoint's name.
    """
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
    table = Table(
        [
            "preset",
            Column("threshold", "g"),
            Column("steps"),
            "chosen on: kept, speed",
            "checked on: kept, speed",
        ]
    )
    for name, facts in presets.items():
        config = facts["config"]
        figures = [
            f"{facts[half]['retention']['value']:.1f} %, {facts[half]['speedup']['value']:.2f}x"
            for half in ("choice", "check")
        ]
        table.add(name, config["confidence_threshold"], config["steps_per_block"], *figures)
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
                number(report["settings"][OTHER]["total"]["retention"]["value"], ".1f", " %"),
                f"{number(change['retention']['value'], '.1f', ' %')} of this bundle's, "
                f"{number(change['speedup']['value'], '.2f', 'x')} its speed",
            )
        )
    return cards


_PASSES = (Column("passes/block", ".2f"), Column("tokens/pass", ".2f"))


def _tasks(report: dict[str, Any]) -> Table:
    """A row for each kind of task, for lengths within and beyond the trained ones, and for all."""
    ar, diffusion = report["settings"][AR], report["settings"][DEFAULT]
    table = Table(
        [
            "task",
            Column("problems"),
            Column("AR right", ".1f", " %"),
            Column("diffusion right", ".1f", " %"),
            Column("kept", ".1f", " %"),
            Column("speed", ".2f", "x"),
            *_PASSES,
            Column("tokens", ".0f"),
        ]
    )

    def add(name: str, before: dict[str, Any], after: dict[str, Any], kind: str = "") -> None:
        table.add(
            name,
            after["problems"],
            before["exact"]["value"],
            after["exact"]["value"],
            after["retention"]["value"],
            after["speedup"]["value"],
            after["passes_per_block"],
            after["tokens_per_pass"],
            after["tokens"] / after["problems"],
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
            Column("right", ".1f", " %"),
            Column("kept, 95 % interval"),
            Column("speed, 95 % interval"),
            *_PASSES,
            Column("tokens/s", ".0f"),
            Column("loops"),
        ]
    )
    whose = {DEFAULT: " (default)", OTHER: " (other bundle)"}
    for name, setting in report["settings"].items():
        config, total = setting["config"], setting["total"]
        threshold, steps = f"{config['confidence_threshold']:g}", config["steps_per_block"]
        table.add(
            "autoregression" if name == AR else threshold + whose.get(name, ""),
            None if name == AR else steps,
            total["exact"]["value"],
            interval_text(total["retention"]),
            interval_text(total["speedup"], 2, "x"),
            total["passes_per_block"],
            total["tokens_per_pass"],
            total["tokens_per_second"],
            total["degenerate"],
            kind="total" if name == DEFAULT else "",
        )
    return table


def _method(report: dict[str, Any]) -> str:
    suite, machine, scores = report["suite"], report["machine"], report.get("likelihood")
    sentences = [
        "Every problem is answered by every setting in turn, one request at a time, so that "
        "system noise affects all equally; the first two answers of each are not counted. "
        "Times include reading the prompt. A right answer is the expected text and nothing else; "
        "a loop is a text that ends in the same up to 16 tokens four times over. Intervals are "
        "percentiles of 2000 paired bootstrap draws of the problems.",
        f"Suite {suite['name']} {suite['sha256'][:12]}, twotower {report['twotower']}, "
        f"Python {machine['python']}.",
    ]
    if scores and scores["nats_per_token"] is not None:
        sentences.append(
            f"The context tower gives the right answers {scores['nats_per_token']:.4f} nats a "
            f"token (perplexity {scores['perplexity']:.3f}); {scores['greedy']:.1f} % of them are "
            "its own first choice throughout."
        )
    return " ".join(sentences)
