"""The price of quantization as one HTML file and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from twotower.evaluate.evaluation import interval_text
from twotower.evaluate.quantization.price import FLOAT, FLOAT_AR, QUANTIZED, QUANTIZED_AR
from twotower.report.page_parts import card, examples, number, page, table

__all__ = ["price_lines", "price_page"]


def price_page(report: dict[str, Any], picture: str) -> str:
    """The page; `picture` is the sensitivity as SVG, or empty."""
    suite, machine, facts = report["suite"], report["machine"], report["quantized"]
    flags = "".join(f"<p><b>Flagged:</b> {escape(flag)}.</p>" for flag in report["flags"])
    sensitivity = f'<div class="picture">{picture}</div>' if picture else ""
    return page(
        "quantization.html",
        report,
        title=escape(f"{facts['name']} against {report['reference']['name']}"),
        subtitle=escape(
            f"recipe {facts['recipe']}, {suite['problems']} problems, target {facts['target']}, {machine['system']}"
        ),
        verdict=flags or "<p>Inside the budget of quality and passes.</p>",
        cards="".join(_cards(report)),
        settings=table(_SETTINGS, _setting_rows(report)),
        bytes=table(_BYTES, _byte_rows(report)),
        sensitivity=sensitivity
        + (
            table(_PARTS, _part_rows(report))
            if report["sensitivity"]
            else f"<p>{escape(report['why_not'])}</p>"
        ),
        tasks=table(
            _TASKS, [("", [kind, *_figures(facts)]) for kind, facts in report["tasks"].items()]
        ),
        lost="".join(examples(report["lost"], "the quantized bundle"))
        or "<p>None: every problem solved before is solved after.</p>",
        method=escape(_method(report)),
    )


def price_lines(report: Mapping[str, Any]) -> list[str]:
    """The same for a terminal."""
    suite, total, weights = report["suite"], report["compared"], report["bytes"]["weights"]
    lines = [
        f"{report['quantized']['name']} ({report['quantized']['recipe']}) against {report['reference']['name']}: "
        f"{suite['problems']} problems of {len(suite['kinds'])} kinds on {report['quantized']['target']}",
        "",
        f"{'':<16}{'right':>9}{'kept':>9}{'passes/block':>14}{'tokens/s':>10}",
    ]
    for name in (FLOAT, QUANTIZED, FLOAT_AR, QUANTIZED_AR):
        t = report["settings"][name]["total"]
        passes = f"{number(t['passes_per_block'], 3):>14}" if "ar" not in name else f"{'-':>14}"
        kept = f"{number(t['retention']['value'], 1):>8}%"
        lines.append(
            f"{name:<16}{t['exact']['value']:>8.1f}%{kept}{passes}{number(t['tokens_per_second'], 0):>10}"
        )
    if report["sensitivity"]:
        lines += [
            "",
            f"{'quantized alone':<28}{'kept, 95 % interval':<26}{'more passes a block':<28}{'same text':>9}",
        ]
        lines += [
            f"{kind:<28}{_kept(facts):<26}{_more(facts):<28}{facts['same_text']:>9}"
            for kind, facts in report["sensitivity"].items()
        ]
    else:
        lines += ["", report["why_not"]]
    lines += [
        "",
        f"weights: {weights['after'] / 1e6:.2f} MB, {weights['after'] / weights['before']:.3f} of before, "
        f"{weights['after'] / weights['bfloat16']:.3f} of bfloat16",
        f"quality: keeps {_kept(total)} %; passes a block: {_more(total)} %",
        f"speed here: a pass {interval_text(total['step_time'], 2)} times as fast, "
        f"with the passes it needs {interval_text(total['speedup'], 2)} times",
    ]
    lines += [f"FLAGGED: {flag}" for flag in report["flags"]] or [
        "inside the budget of quality and passes"
    ]
    return lines


def _kept(facts: Mapping[str, Any]) -> str:
    return interval_text(facts["retention"])


def _more(facts: Mapping[str, Any]) -> str:
    moved = {k: None if v is None else 100 * (v - 1) for k, v in facts["inflation"].items()}
    return interval_text(moved)


def _cards(report: dict[str, Any]) -> list[str]:
    total, weights, budget = report["compared"], report["bytes"]["weights"], report["budget"]
    kept, more = total["retention"]["value"], total["inflation"]["value"]
    good = " good" if kept is not None and kept >= budget["percent"] else " bad"
    steady = " good" if more is not None and 100 * (more - 1) <= budget["max_inflation"] else " bad"
    before, after = total["passes_per_block"]
    return [
        card("quality kept", number(kept, 1, " %"), f"95 % interval {_kept(total)}", good),
        card(
            "more passes a block",
            _signed(more),
            f"{number(before, 3)} before, {number(after, 3)} after",
            steady,
        ),
        card(
            "a pass is",
            number(total["step_time"]["value"], 2, "x"),
            f"as fast, interval {interval_text(total['step_time'], 2)}",
        ),
        card(
            "true speedup",
            number(total["speedup"]["value"], 2, "x"),
            "step-time ratio over pass ratio",
        ),
        card(
            "of bfloat16's bytes",
            number(weights["after"] / weights["bfloat16"], 3, "x"),
            f"{weights['after'] / 1e6:.2f} MB of weights",
        ),
    ]


def _signed(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


_SETTINGS = ("", "right", "kept, 95 % interval", "passes a block", "tokens a pass", "tokens/s")
_BYTES = ("layer kind", "stored as", "before", "after", "of bfloat16")
_PARTS = (
    "quantized alone",
    "kept, 95 % interval",
    "more passes a block, 95 % interval",
    "a pass is",
    "true speedup",
    "same text",
    "lost",
    "won",
)
_TASKS = ("task", *_PARTS[1:])


def _setting_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for name in (FLOAT, QUANTIZED, FLOAT_AR, QUANTIZED_AR):
        t = report["settings"][name]["total"]
        cells = [number(t["exact"]["value"], 1, " %"), interval_text(t["retention"])]
        rates = [
            number(t["passes_per_block"], 3),
            number(t["tokens_per_pass"], 2),
            number(t["tokens_per_second"], 0),
        ]
        rows.append(("total" if name == QUANTIZED else "", [name, *cells, *rates]))
    return rows


def _byte_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    stored = report["quantized"]["precision"]
    kinds = report["bytes"]["kinds"]
    rows = [
        ("", [kind, stored.get(kind, "-"), *_sizes(b["before"], b["after"], b["bfloat16"])])
        for kind, b in kinds.items()
    ]
    total = report["bytes"]["weights"]
    rows.append(
        ("total", ["all weights", "", *_sizes(total["before"], total["after"], total["bfloat16"])])
    )
    files = report["bytes"]["files"]
    rows.append(
        (
            "total",
            [
                "bundle, graphs and tokenizer included",
                "",
                *_sizes(files["before"], files["after"], None),
            ],
        )
    )
    return rows


def _sizes(before: int, after: int, half: int | None) -> list[str]:
    return [
        f"{before / 1e6:.3f} MB",
        f"{after / 1e6:.3f} MB",
        "-" if not half else f"{after / half:.3f}",
    ]


def _part_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    rows = [("", [kind, *_figures(facts)]) for kind, facts in report["sensitivity"].items()]
    return [*rows, ("total", ["all together", *_figures(report["compared"])])]


def _figures(facts: Mapping[str, Any]) -> list[str]:
    speeds = [number(facts[name]["value"], 2, "x") for name in ("step_time", "speedup")]
    return [
        _kept(facts),
        _more(facts),
        *speeds,
        f"{facts['same_text']} of {facts['problems']}",
        str(facts["lost"]),
        str(facts["won"]),
    ]


def _method(report: dict[str, Any]) -> str:
    suite, machine = report["suite"], report["machine"]
    return " ".join(
        [
            "Every problem is answered by every model in turn, one request at a time: all share the machine's moods. Kept: right answers",
            "of the quantized bundle over those of the float bundle. A pass is timed with the context tower's share, without the prompt.",
            "True speedup: how much faster a pass is, divided by how many more of them a block needs. Intervals are percentiles of 2000",
            "paired bootstrap draws of the problems. Speeds are of this target on this machine and say nothing of another.",
            *(
                [
                    "ONNX Runtime on a CPU expands few-bit weights in every pass: a quantized bundle is smaller there, not faster."
                ]
                if report["quantized"]["target"] == "ort-cpu"
                else []
            ),
            f"Suite {suite['name']} {suite['sha256'][:12]}, twotower {report['twotower']}, Python {machine['python']}.",
        ]
    )
