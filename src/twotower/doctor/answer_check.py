"""Whether a bundle's engine gives the bundle's known answer, and which known defect looks like it if it does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from twotower.bundle import BUILD_FILE, Bundle, engine_folder
from twotower.doctor.canary import CheckResult
from twotower.doctor.diagnosis import Comparison, Observed, compare, symptoms_of
from twotower.doctor.known_answer import (
    Answer,
    KnownAnswer,
    answers_of,
    compute_answer,
    read_answer,
    tokens_in_company,
    write_answer,
)
from twotower.doctor.known_issues import Setting, Symptom, explain
from twotower.errors import EngineMismatchError, EngineOutputError
from twotower.runtime import TwoTower

__all__ = ["KEPT_BY", "Opener", "check_answer", "known_answer_of", "setting_of"]

KEPT_BY = "ort-cpu"
"""The target whose answer is kept: its graphs were compared with torch, and it computes in float32."""

Opener = Callable[[], AbstractContextManager[TwoTower]]
"""Opens a bundle's engines; they are closed when the `with` statement ends."""


def known_answer_of(bundle: Bundle, open_reference: Opener) -> tuple[KnownAnswer | None, str]:
    """The answer kept with a bundle, or computed by its reference engine and kept; and where it comes from.

    Args:
        bundle: The bundle.
        open_reference: Opens the `KEPT_BY` engines.
    """
    kept = read_answer(bundle)
    if kept is not None:
        return kept, f"kept in the bundle, computed by {kept.made_by}"
    try:
        with open_reference() as model:
            answer = compute_answer(bundle, model)
    except EngineMismatchError as e:
        return (
            None,
            f"{e.what}; run `twotower build {bundle.path} --target {KEPT_BY}` and check again, on any machine",
        )
    written = write_answer(bundle, answer)
    return (
        answer,
        f"computed by {answer.made_by} and {'kept in the bundle' if written else 'not kept: the bundle cannot be written'}",
    )


def setting_of(bundle: Bundle, target: str, sm: int | None = None) -> Setting:
    """Where an engine runs, from its build record; call it for an engine that has been opened, and so checked."""
    record = json.loads((engine_folder(bundle, target) / BUILD_FILE).read_text(encoding="utf-8"))
    report = record["report"]
    graphs = [
        *report.get("operators", {}).values(),
        *(facts["operators"] for facts in report.get("engines", {}).values()),
    ]
    operators = frozenset(op for graph in graphs for op in graph)
    return Setting(target=target, dtype=str(record["dtype"]), sm=sm, operators=operators)


def check_answer(
    known: KnownAnswer, model: TwoTower, setting: Setting, *, open_plain: Opener | None = None
) -> Iterator[CheckResult]:
    """One check, and for an engine that fails it the known defects with its symptoms.

    Args:
        known: The bundle's known answer.
        model: The engine to check.
        setting: Where it runs.
        open_plain: Opens the same engine without CUDA graphs; asked only when something is wrong.
    """
    needed = max(len(a.prompt) + len(a.tokens) for a in (known.short, known.long))
    if model.max_context < needed:
        held = (
            f"these engines hold texts of {model.max_context} tokens, the known answer has {needed}"
        )
        yield CheckResult(
            "known answer", None, f"{held}: build them with --max-context {needed} or more"
        )
        return
    try:
        seen = _observed(known, model, setting.dtype, open_plain)
    except EngineOutputError as e:
        symptoms: tuple[Symptom, ...] = (Symptom.NOT_FINITE,)
        yield CheckResult("known answer", False, str(e))
    else:
        symptoms = symptoms_of(seen)
        yield CheckResult("known answer", not symptoms, _detail(seen, symptoms))
    for issue in explain(symptoms, setting):
        yield CheckResult(
            "known issue with this symptom", None, f"{issue.name} ({issue.reference}); {issue.do}"
        )


def _observed(
    known: KnownAnswer, model: TwoTower, dtype: str, open_plain: Opener | None
) -> Observed:
    short, long = (answers_of(model, a.prompt, a) for a in (known.short, known.long))
    others = [known.short.prompt[::-1], tuple(sorted(known.short.prompt))]
    company = tokens_in_company(model, [known.short.prompt, *others])
    padded = tokens_in_company(model, [known.short.prompt, known.long.prompt])
    seen = compare(known.short, short)
    plain = None
    if open_plain is not None and seen.wrong(dtype):
        with open_plain() as other:
            plain = compare(known.short, answers_of(other, known.short.prompt, known.short))
    return Observed(
        dtype=dtype,
        short=seen,
        long=compare(known.long, long),
        company=_same_text(company, short, dtype),
        padded=_same_text(padded, short, dtype),
        company_right=company == known.short.tokens,
        plain=plain,
    )


def _same_text(tokens: tuple[int, ...], alone: Answer, dtype: str) -> bool | None:
    """Whether company changed nothing; a half-wide engine may choose another kernel for other shapes and round otherwise."""
    same = tokens == alone.tokens
    return same if same or dtype == "float32" else None


def _detail(seen: Observed, symptoms: tuple[Symptom, ...]) -> str:
    texts = ", ".join(
        f"{name} text {_described(c, seen.dtype)}"
        for name, c in (("short", seen.short), ("long", seen.long))
    )
    return f"{'; '.join(symptoms)}: {texts}" if symptoms else texts


def _described(c: Comparison, dtype: str) -> str:
    if not c.finite:
        return "not finite"
    tokens = "same tokens" if c.first is None else f"parts at token {c.first}"
    why = "" if c.first is None or c.wrong(dtype) else ", as rounding may"
    return f"{tokens}{why} (error {c.error:.1e})"
