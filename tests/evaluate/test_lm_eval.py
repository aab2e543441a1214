"""A bundle in lm-evaluation-harness: its own evaluation without a network, and our numbers."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.processes import run_python
from tests.helpers.source import ROOT
from twotower.config import GenerationConfig
from twotower.errors import ConfigError, RequestError
from twotower.runtime import TwoTower

pytestmark = [pytest.mark.trained, pytest.mark.slow]
QUESTIONS = (
    "sums: a 12+35 b 48+21 c 17+17 d 30+49 e 26+16 f 41+12 g 33+44 h 15+28",
    "write from Ann to Omar: green kite, Kyoto, Friday, owl",
)
PROMPTS = [f"Q: {q}\nA:" for q in QUESTIONS]


@pytest.fixture(scope="module")
def adapter(tiny_bundle: Path) -> Any:
    model = lm(bundle=str(tiny_bundle), mode="ar", max_gen_toks=64, max_batch=2)
    yield model
    model.model.close()


def lm(**arguments: Any) -> Any:
    """The class, imported only where its library is wanted."""
    from twotower.evaluate.lm_eval_model import TwoTowerLM

    return TwoTowerLM(**arguments)


def instances(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=a) for a in arguments]


class Noted(list[tuple[str, Any, Any]]):
    """A cache hook that keeps what it is given."""

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        self.append((kind, request, result))


def test_generations_are_those_of_the_model_and_end_where_the_task_says(adapter: Any) -> None:
    greedy = {"until": [], "do_sample": False, "temperature": 0.0}
    asked = [
        (PROMPTS[1], {"until": [" about"]}),
        (PROMPTS[0], greedy),
        (PROMPTS[1], {"max_gen_toks": 5}),
    ]
    texts = adapter.generate_until(instances(*asked))
    whole = [adapter.model.generate(p, adapter._config({})).text for p in PROMPTS]
    assert texts[0] == whole[1].split(" about")[0] != whole[1]
    assert texts[1] == whole[0]
    assert whole[1].startswith(texts[2])
    assert len(texts[2]) < len(whole[1])


def test_likelihoods_are_the_context_towers(adapter: Any) -> None:
    answer = adapter.model.generate(PROMPTS[0], adapter._config({})).text
    pairs = [(PROMPTS[0], answer), (PROMPTS[0], " a 47 b 70"), ("", "Q:")]
    got = adapter.loglikelihood(instances(*pairs))
    assert [g[0] for g in got] == [s.total for s in adapter.model.score(pairs)]
    likely, unlikely, _ = got
    assert likely[1] is True and unlikely[1] is False
    assert likely[0] > unlikely[0]


def test_rolling_likelihood_is_that_of_the_whole_text(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{PROMPTS[0]} a 47"
    (whole,) = adapter.loglikelihood_rolling(instances((text,)))
    assert whole == pytest.approx(adapter.model.score(("", text)).total, abs=1e-3)
    assert math.isfinite(whole)
    tokens = len(adapter.model.tokenizer.encode(text)) - 1
    seen = []
    real = TwoTower.score
    monkeypatch.setattr(
        TwoTower, "score", lambda self, pairs: seen.extend(pairs) or real(self, pairs)
    )
    monkeypatch.setattr(type(adapter.model.config), "max_position_embeddings", 21)
    (cut,) = adapter.loglikelihood_rolling(instances((text,)))
    assert len(seen) == -(-tokens // 20) > 1, "as few windows as there can be"
    assert max(len(context) + len(continuation) for context, continuation in seen) <= 21
    assert sum(len(continuation) for _, continuation in seen) == tokens, (
        "every token is predicted exactly once"
    )
    assert cut == pytest.approx(sum(score.total for score in real(adapter.model, seen)))


def test_results_are_in_the_order_of_the_requests_and_in_the_cache(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted()
    monkeypatch.setattr(adapter, "cache_hook", noted)
    prompts = [PROMPTS[1], "Q: sort: q c\nA:", PROMPTS[0], "Q:", PROMPTS[1] + " Dear"]
    asked = [(p, {"max_gen_toks": 4 + i}) for i, p in enumerate(prompts)]
    texts = adapter.generate_until(instances(*asked))
    assert texts == [
        adapter.model.generate(p, GenerationConfig(mode="ar", max_new_tokens=4 + i)).text
        for i, p in enumerate(prompts)
    ]
    pairs = [(p, " a 47"[: 2 + i]) for i, p in enumerate(prompts)]
    scores = adapter.loglikelihood(instances(*pairs))
    assert [s[0] for s in scores] == pytest.approx(
        [adapter.model.score(pair).total for pair in pairs], abs=1e-3
    )
    whole = adapter.loglikelihood_rolling(instances(*[(p,) for p in prompts]))
    assert whole == pytest.approx([adapter.model.score(("", p)).total for p in prompts], abs=1e-3)
    kept = {(kind, repr(request)): result for kind, request, result in noted}
    assert [kept["generate_until", repr(a)] for a in asked] == texts
    assert [kept["loglikelihood", repr(p)] for p in pairs] == scores
    assert [kept["loglikelihood_rolling", repr((p,))] for p in prompts] == whole


def test_diffusion_is_the_default_and_its_options_are_used(tiny_bundle: Path) -> None:
    from twotower.evaluate.lm_eval_model import TwoTowerLM

    options = f"bundle={tiny_bundle},threshold=0.5,steps=4,max_gen_toks=40"
    model = TwoTowerLM.create_from_arg_string(options, {"batch_size": 1, "device": None})
    with model.model as session:
        want = GenerationConfig(confidence_threshold=0.5, steps_per_block=4, max_new_tokens=40)
        want = want.seeded()
        assert model._config({}) == want
        assert model.generate_until(instances((PROMPTS[0], {"until": []}))) == [
            session.generate(PROMPTS[0], want).text
        ]
        assert model._config({"do_sample": True, "temperature": 1.0, "top_p": 0.9}).top_p == 1, (
            "not defined for diffusion"
        )


def test_a_repeated_request_is_another_sample_and_a_repeated_call_the_same(
    adapter: Any, tiny_bundle: Path
) -> None:
    hot = (PROMPTS[1], {"do_sample": True, "temperature": 9.0, "max_gen_toks": 12})
    texts = adapter.generate_until(instances(hot, hot, hot))
    assert len(set(texts)) == 3
    assert adapter.generate_until(instances(hot, hot, hot)) == texts
    with lm(bundle=str(tiny_bundle), mode="ar", seed=1).model as other:
        config = GenerationConfig(mode="ar", temperature=9.0, max_new_tokens=12, seed=1)
        assert other.generate(PROMPTS[1], config).text == texts[1]
    cold = (PROMPTS[1], {"do_sample": False, "temperature": 9.0, "max_gen_toks": 12})
    assert len(set(adapter.generate_until(instances(cold, cold)))) == 1


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"max_new_tokens": 5, "num_beams": 1}, {"max_new_tokens": 5}),
        ({"max_gen_toks": 6, "max_new_tokens": 5, "max_tokens": None}, {"max_new_tokens": 6}),
        ({"until": "x"}, {"stop": ("x",)}),
        ({"until": ["x", "", "yz"]}, {"stop": ("x", "yz")}),
        (
            {"temperature": 0.5, "top_k": 7, "top_p": 0.9},
            {"temperature": 0.5, "top_k": 7, "top_p": 0.9},
        ),
        ({"temperature": 0.5, "top_k": -1}, {"temperature": 0.5}),
        ({"temperature": 0.5, "top_k": 7, "do_sample": False}, {}),
    ],
)
def test_a_tasks_options_are_honoured(
    adapter: Any, options: dict[str, Any], changed: dict[str, Any]
) -> None:
    common = {"mode": "ar", "max_new_tokens": 64, "seed": 0}
    assert adapter._config(options) == GenerationConfig(**{**common, **changed})


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({}, "no bundle"),
        ({"bundle": "B", "treshold": 0.5}, "treshold"),
        ({"bundle": "B", "mode": "poetry"}, "mode"),
        ({"bundle": "B", "max_batch": "many"}, "max_batch"),
        ({"bundle": "B", "max_gen_toks": "many"}, "max_new_tokens"),
        ({"bundle": "B", "threshold": 2}, "confidence_threshold"),
        ({"bundle": "B", "seed": "new"}, "seed"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    tiny_bundle: Path, arguments: dict[str, Any], what: str
) -> None:
    arguments = {k: str(tiny_bundle) if v == "B" else v for k, v in arguments.items()}
    with pytest.raises(ConfigError) as caught:
        lm(**arguments)
    assert what in str(caught.value)


def test_what_cannot_be_honoured_is_refused(adapter: Any, built_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        lm(bundle=str(built_bundle))
    for options, what in (
        ({"num_beams": 4}, "num_beams above 1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
    ):
        with pytest.raises(RequestError, match=what):
            adapter.generate_until(instances((PROMPTS[0], options)))


def test_a_request_that_is_too_long_is_refused_before_any_work(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted()
    monkeypatch.setattr(adapter, "cache_hook", noted)
    with pytest.raises(RequestError, match="prompt 3 is too long"):
        adapter.generate_until(instances(*[(p, {}) for p in [*PROMPTS, "Q:", "x y " * 4000]]))
    with pytest.raises(RequestError, match="too long"):
        adapter.loglikelihood(instances(*[(p, " a") for p in [*PROMPTS, "Q:", "x y " * 4000]]))
    assert noted == []


def test_the_librarys_evaluation_of_every_kind(
    adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that ask for likelihoods carry no data: these are templates with two documents."""
    import lm_eval

    def refuse(*_: Any) -> None:
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    answers = [
        adapter.model.generate(p, adapter._config({"max_gen_toks": 24})).text for p in PROMPTS
    ]
    choices = [[" blue", answers[0]], [answers[1], " a 47"]]
    documents = [
        {"prompt": p, "gold": g, "choices": c, "right": i}
        for p, g, c, i in zip(PROMPTS, answers, choices, (1, 0), strict=True)
    ]
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(map(json.dumps, documents)))
    data = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    write = {"output_type": "generate_until", "doc_to_target": "gold", "metric_list": [exact]}
    write["generation_kwargs"] = {"max_gen_toks": 24, "until": []}
    choose = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
    whole_text = {"output_type": "loglikelihood_rolling", "doc_to_text": ""}
    tasks = [
        {**shared, **write, "task": "write"},
        {**shared, **choose, "doc_to_target": "right", "task": "choose"},
        {**shared, **whole_text, "doc_to_target": "{{prompt}}", "task": "whole"},
    ]
    found = lm_eval.simple_evaluate(model=adapter, tasks=tasks, bootstrap_iters=0)
    assert found["results"]["write"]["exact_match,none"] == 1
    assert found["results"]["choose"]["acc,none"] == 1
    whole = [adapter.model.score(("", p)).total for p in PROMPTS]
    words = sum(len(p.split()) for p in PROMPTS)
    assert found["results"]["whole"]["word_perplexity,none"] == pytest.approx(
        math.exp(-sum(whole) / words), rel=1e-3
    )


NO_NETWORK = """
import socket
def refuse(*_): raise OSError('no network')
socket.socket.connect = refuse
"""


COMMAND = ["run", "--model", "twotower", "--tasks", "niah_single_1", "--model_args"]


def test_a_task_of_the_library_runs_without_a_network(tiny_bundle: Path, tmp_path: Path) -> None:
    """RULER's needle in repeated text, which the library writes; it need not be found."""
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    # Only asked for, never read: this haystack has no sentences.
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    tokenizer = ROOT / "assets" / "twotower-tiny"
    arguments = f"bundle={tiny_bundle},tokenizer={tokenizer},max_gen_toks=16"
    words = ["--limit", "3", "--metadata", '{"max_seq_lengths": [700]}', "--log_samples"]
    words += ["--output_path", str(tmp_path / "out")]
    done = run_python(
        *("-m", "twotower.evaluate.lm_eval_model", *COMMAND, arguments, *words),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HOME=str(tmp_path / "hf"),
        NLTK_DATA=str(tmp_path / "nltk"),
        PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT / "src"))),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "niah_single_1" in done.stdout
    (samples,) = (tmp_path / "out").rglob("samples_niah_single_1*.jsonl")
    assert len(samples.read_text().splitlines()) == 3
    assert "punkt_tab" not in done.stderr


def test_what_a_user_can_cause_ends_with_2_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from twotower.evaluate import lm_eval_model

    monkeypatch.setattr(sys, "argv", ["lm_eval", *COMMAND, f"bundle={tmp_path / 'none'}"])
    assert lm_eval_model.main() == 2
    said = capsys.readouterr().err
    assert "is not a bundle" in said
    assert "Traceback" not in said
