"""The evaluation as one HTML file that needs nothing else: verdict, curve, tasks, sweep, and the problems that were lost."""

from __future__ import annotations

from html import escape
from typing import Any

from twotower.evaluate.evaluation import AR, DEFAULT, OTHER, interval_text
from twotower.report.page_parts import card, examples, number, page, table

__all__ = ["report_page", "where_it_loses"]


def report_page(report: dict[str, Any], curve: str) -> str:
    """The page.

    Args:
        report: `Evaluation.report`.
        curve: The picture as SVG.
    """
    suite, machine = report["suite"], report["machine"]
    return page(
        "evaluation.html",
        report,
        title=escape(f"{report['bundle']['name']} on {report['bundle']['target']}"),
        subtitle=escape(
            f"{suite['problems']} problems of {len(suite['kinds'])} kinds, one at a time, {machine['system']}"
        ),
        cards="".join(_cards(report)),
        curve=curve,
        kinds=table(_KIND_HEAD, _kind_rows(report)),
        loses=_sentence(where_it_loses(report)),
        sweep=table(_SWEEP_HEAD, _sweep_rows(report)),
        lost="".join(examples(report["lost"]))
        or "<p>None: every problem that autoregression solved, diffusion solved too.</p>",
        method=escape(_method(report)),
    )


def where_it_loses(report: dict[str, Any]) -> list[str]:
    """Kinds of task on which the default preset is slower than autoregression, or keeps less than the budget (98.7 % without one)."""
    wanted = report.get("budget", {}).get("percent", 98.7)
    out = []
    for kind, facts in report["settings"][DEFAULT]["kinds"].items():
        retention, speedup = facts["retention"]["value"], facts["speedup"]["value"]
        reasons = (
            [f"keeps {retention:.1f} %"] if retention is not None and retention < wanted else []
        )
        reasons += [f"runs at {speedup:.2f}x"] if speedup is not None and speedup < 1 else []
        if reasons:
            out.append(f"{kind} ({', '.join(reasons)})")
    return out


def _cards(report: dict[str, Any]) -> list[str]:
    ar, diffusion = report["settings"][AR]["total"], report["settings"][DEFAULT]["total"]
    budget = report.get("budget")
    state = (
        ""
        if budget is None or budget["setting"] != DEFAULT
        else (" good" if budget["met"] else " bad")
    )
    kept, faster = diffusion["retention"], diffusion["speedup"]
    figures = [
        (
            "quality kept",
            number(kept["value"], 1, " %"),
            f"95 % interval {interval_text(kept)}",
            state,
        ),
        (
            "faster than autoregression",
            number(faster["value"], 2, "x"),
            f"95 % interval {interval_text(faster, 2)}",
            "",
        ),
        (
            "tokens a pass",
            number(diffusion["tokens_per_pass"], 2),
            f"{number(diffusion['passes_per_block'], 2)} passes a block",
            "",
        ),
        (
            "right answers",
            number(diffusion["exact"]["value"], 1, " %"),
            f"autoregression {number(ar['exact']['value'], 1, ' %')}",
            "",
        ),
        (
            "tokens a second",
            number(diffusion["tokens_per_second"], 0),
            f"autoregression {number(ar['tokens_per_second'], 0)}",
            "",
        ),
    ]
    if OTHER in report["settings"]:
        other, change = report["settings"][OTHER]["total"], report["other_to_default"]["total"]
        note = f"{number(change['retention']['value'], 1, ' %')} of this bundle's, {number(change['speedup']['value'], 2, 'x')} its speed"
        figures.append(
            (
                f"{report['other']['name']} keeps",
                number(other["retention"]["value"], 1, " %"),
                note,
                "",
            )
        )
    return [card(*figure) for figure in figures]


_KIND_HEAD = (
    "task",
    "problems",
    "AR right",
    "diffusion right",
    "kept",
    "speed",
    "passes a block",
    "tokens a pass",
    "tokens",
)
_SWEEP_HEAD = (
    "threshold",
    "steps",
    "right",
    "kept, 95 % interval",
    "speed, 95 % interval",
    "passes a block",
    "tokens a pass",
    "tokens/s",
    "loops",
)


def _kind_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    ar, diffusion = report["settings"][AR], report["settings"][DEFAULT]
    groups = [
        (kind, ar["kinds"][kind], diffusion["kinds"][kind], "") for kind in diffusion["kinds"]
    ]
    names = {"in": "of trained lengths", "out": "beyond trained lengths"}
    groups += [
        (names[length], ar["lengths"][length], diffusion["lengths"][length], "group")
        for length in diffusion["lengths"]
    ]
    groups.append(("all", ar["total"], diffusion["total"], "total"))
    return [
        (
            css,
            [
                name,
                str(d["problems"]),
                number(a["exact"]["value"], 1, " %"),
                number(d["exact"]["value"], 1, " %"),
                number(d["retention"]["value"], 1, " %"),
                number(d["speedup"]["value"], 2, "x"),
                number(d["passes_per_block"], 2),
                number(d["tokens_per_pass"], 2),
                number(d["tokens"] / d["problems"], 0),
            ],
        )
        for name, a, d, css in groups
    ]


def _sweep_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for name, setting in report["settings"].items():
        config, total = setting["config"], setting["total"]
        first = {AR: ["autoregression", "-"]}.get(
            name, [f"{config['confidence_threshold']:g}", str(config["steps_per_block"])]
        )
        first[0] += {DEFAULT: " (default)", OTHER: " (other bundle)"}.get(name, "")
        cells = [
            number(total["exact"]["value"], 1, " %"),
            interval_text(total["retention"]),
            interval_text(total["speedup"], 2, "x"),
            number(total["passes_per_block"], 2),
            number(total["tokens_per_pass"], 2),
            number(total["tokens_per_second"], 0),
            str(total["degenerate"]),
        ]
        rows.append(("total" if name == DEFAULT else "", [*first, *cells]))
    return rows


def _sentence(kinds: list[str]) -> str:
    if not kinds:
        return "<p>At the default preset there is no kind of task on which diffusion is slower or keeps too little.</p>"
    return f"<p>Diffusion loses at the default preset on: <b>{escape('; '.join(kinds))}</b>.</p>"


def _method(report: dict[str, Any]) -> str:
    suite, machine, scores = report["suite"], report["machine"], report.get("likelihood")
    sentences = [
        "Every problem is answered by every setting in turn, one request at a time, so all share the machine's moods;",
        "the first two are answered once uncounted. Times include reading the prompt. A right answer is the expected text and nothing",
        "else; a loop is a text that ends in the same up to 16 tokens four times over. Intervals are percentiles of 2000 paired",
        "bootstrap draws of the problems.",
        f"Suite {suite['name']} {suite['sha256'][:12]}, twotower {report['twotower']}, Python {machine['python']}.",
    ]
    if scores and scores["nats_per_token"] is not None:
        sentences += [
            f"The context tower gives the right answers {scores['nats_per_token']:.4f} nats a token",
            f"(perplexity {scores['perplexity']:.3f});",
            f"{scores['greedy']:.1f} % of them are its own first choice throughout.",
        ]
    return " ".join(sentences)
