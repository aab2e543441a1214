"""The impact of quantization for people: one HTML file, and lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower.evaluate.evaluation import origin_text
from twotower.evaluate.quantization.impact import (
    FLOAT,
    FLOAT_AR,
    QUANTIZED,
    QUANTIZED_AR,
    more_passes,
)
from twotower.evaluate.resampling import Interval, interval_text
from twotower.report.pages import Card, Page, paragraphs, picture, unfolding_examples
from twotower.report.tables import Column, Table, number
from twotower.units import format_bytes


def impact_page(report: Mapping[str, Any], sensitivity: str, *, model: str) -> str:
    """The page of a report by `impact_of`, with the sensitivity as SVG (or empty)."""
    suite, facts = report["suite"], report["quantized"]
    flags = "".join(
        paragraphs(f"Flagged: {flag}.").replace(
            "Flagged:",
            "<b>Flagged:</b>",
            1,
        )
        for flag in report["flags"]
    )
    alone = (
        _parts("quantized alone", {**report["sensitivity"], "all together": report["compared"]})
        if report["sensitivity"]
        else None
    )
    return Page(
        title=f"{model}: impact of quantization by recipe {facts['recipe']}",
        subtitle=f"{facts['name']} against {report['reference']['name']}, {suite['problems']} "
        f"problems, target {facts['target']}, {report['machine']['system']}",
        verdict=flags or paragraphs("Inside the budget of quality and passes."),
        cards=_cards(report),
        sections={
            "Before and after": _settings(report).html(),
            "Bytes of the weights": _sizes(report).html(),
            "One part at a time": (picture(sensitivity) if sensitivity else "")
            + (alone.html() if alone else paragraphs(report["why_not"])),
            "By task": _parts("task", report["tasks"]).html(),
            "Solved before, lost by quantization": unfolding_examples(
                report["lost"],
                "the quantized bundle",
                "None: every problem solved before is solved after.",
            ),
        },
        method=_method(report),
        data=report,
    ).html()


def impact_lines(report: Mapping[str, Any]) -> list[str]:
    """The same for a terminal."""
    suite, total, weights = report["suite"], report["compared"], report["bytes"]["weights"]
    facts = report["quantized"]
    return [
        f"{facts['name']} ({facts['recipe']}) against {report['reference']['name']}: "
        f"{suite['problems']} problems of {len(suite['kinds'])} kinds on {facts['target']}",
        "",
        *_settings(report).text(),
        "",
        *(
            _parts("quantized alone", report["sensitivity"]).text()
            if report["sensitivity"]
            else [report["why_not"]]
        ),
        "",
        f"weights: {format_bytes(weights['after'])}, "
        f"{weights['after'] / weights['before']:.3f} of before, "
        f"{weights['after'] / weights['bfloat16']:.3f} of bfloat16",
        f"quality: keeps {interval_text(total['retention'])} %; "
        f"passes a block: {_inflation(total['inflation'])} %",
        f"speed here: a pass {interval_text(total['step_time'], 2)} times as fast, "
        f"with the passes it needs {interval_text(total['speedup'], 2)} times",
        *(
            [f"FLAGGED: {flag}" for flag in report["flags"]]
            or ["inside the budget of quality and passes"]
        ),
    ]


def choice_lines(report: Mapping[str, Any]) -> list[str]:
    """What recipe `auto` measured and chose; `report` is that of `choose`."""
    table = Table(
        [
            Column("alone", left=True, of="kind"),
            Column("in", left=True, of="candidate"),
            Column("kept, 95 % interval", interval_text, of="retention"),
            Column("more passes a block, %", _inflation, of="inflation"),
        ]
    )
    for facts in report["alone"]:
        table.add_facts(facts)
    check = report["check"]
    return [
        "",
        *table.text(),
        f"{len(report['tried'])} mixed-precision variants measured; "
        f"{len(report['layers'])} layers in another format than their kind",
        f"checked on the other half: keeps {interval_text(check['retention'])} %, "
        f"{_inflation(check['inflation'])} % more passes a block",
    ]


def _inflation(ratio: Interval) -> str:
    """Percent of more passes a block, with the interval."""
    return interval_text(more_passes(ratio))


def _cards(report: Mapping[str, Any]) -> list[Card]:
    total, weights, budget = report["compared"], report["bytes"]["weights"], report["budget"]
    kept, more = total["retention"]["value"], more_passes(total["inflation"])["value"]
    before, after = total["passes_per_block"]
    return [
        Card(
            "quality kept",
            number(kept, ".1f", " %"),
            f"95 % interval {interval_text(total['retention'])}",
            kept is not None and kept >= budget["percent"],
        ),
        Card(
            "more passes a block",
            number(more, "+.1f", " %"),
            f"{number(before, '.3f')} before, {number(after, '.3f')} after",
            more is not None and more <= budget["max_inflation"],
        ),
        Card(
            "a pass is",
            number(total["step_time"]["value"], ".2f", "x"),
            f"as fast, interval {interval_text(total['step_time'], 2)}",
        ),
        Card(
            "true speedup",
            number(total["speedup"]["value"], ".2f", "x"),
            "step-time ratio over pass ratio",
        ),
        Card(
            "of bfloat16's bytes",
            number(weights["after"] / weights["bfloat16"], ".3f", "x"),
            f"{format_bytes(weights['after'])} of weights",
        ),
    ]


def _settings(report: Mapping[str, Any]) -> Table:
    """Both bundles in both modes."""
    table = Table(
        [
            "",
            Column("right", ".1f", " %", "exact.value"),
            Column("kept, 95 % interval", interval_text, of="retention"),
            Column("passes/block", ".3f", of="passes_per_block"),
            Column("tokens/pass", ".2f", of="tokens_per_pass"),
            Column("tokens/s", ".0f", of="tokens_per_second"),
        ]
    )
    for name in (FLOAT, QUANTIZED, FLOAT_AR, QUANTIZED_AR):
        kind = "total" if name == QUANTIZED else ""
        table.add_facts(
            report["settings"][name]["total"],
            name,
            kind=kind,
        )
    return table


def _sizes(report: Mapping[str, Any]) -> Table:
    """Bytes by layer kind, of all weights and of all files."""
    table = Table(
        [
            "layer kind",
            Column("stored as"),
            Column("before", format_bytes),
            Column("after", format_bytes),
            Column("of bfloat16", ".3f"),
        ]
    )

    def add(
        name: str,
        stored: str,
        size: Mapping[str, int],
        kind: str = "",
    ) -> None:
        half = size.get("bfloat16")
        share = size["after"] / half if half else None
        table.add(name, stored, size["before"], size["after"], share, kind=kind)

    stored, sizes = report["quantized"]["precision"], report["bytes"]
    for name, size in sizes["kinds"].items():
        add(name, stored.get(name, "-"), size)
    add("all weights", "", sizes["weights"], "total")
    add("bundle, graphs and tokenizer included", "", sizes["files"], "total")
    return table


def _parts(heading: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Quality, passes and speed of every part that was quantized alone, or of every task."""
    table = Table(
        [
            heading,
            Column("kept, 95 % interval", interval_text, of="retention"),
            Column("more passes a block, %", _inflation, of="inflation"),
            Column("a pass is", ".2f", "x", "step_time.value"),
            Column("true speedup", ".2f", "x", "speedup.value"),
            Column("same text", of="same_text"),
            Column("lost", of="lost"),
            Column("won", of="won"),
        ]
    )
    for name, facts in rows.items():
        same = f"{facts['same_text']} of {facts['problems']}"
        kind = "total" if name == "all together" else ""
        table.add_facts({**facts, "same_text": same}, name, kind=kind)
    return table


def _method(report: Mapping[str, Any]) -> str:
    sentences = [
        "Every problem is answered by every model in turn, one request at a time, so that system "
        "noise affects all equally. Kept: right answers of the quantized bundle over those of the "
        "float bundle. A pass is timed with the context tower's share, without the prompt. "
        "True speedup: how much faster a pass is, divided by how many more of them a block needs. "
        "Intervals are percentiles of 2000 paired bootstrap draws of the problems. Speeds are of "
        "this target on this machine and say nothing of another."
    ]
    if report["quantized"]["target"] == "ort-cpu":
        sentences.append(
            "ONNX Runtime on a CPU expands quantized weights in every pass: a quantized bundle is "
            "smaller there, not faster."
        )
    sentences.append(origin_text(report))
    return " ".join(sentences)
