"""The key of an engine: everything that changes the engine changes it, nothing else does."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from twotower.builders import cache_keys
from twotower.builders.cache_keys import EngineIdentity, GpuIdentity, engine_key

L4 = GpuIdentity(name="NVIDIA L4", sm=89, driver="580.1")
BASE = EngineIdentity(
    graph="g",
    holds="w",
    library={"name": "tensorrt_rtx", "version": "1.7.1"},
    dtype="float16",
    inputs=[["tokens", "int64", ["B", "L"]]],
    profiles=[{"name": "decode", "axes": {"B": [1, 8, 8], "L": [1, 1, 1]}}],
    sms=(86, 89),
)
OTHER: dict[str, Any] = {
    "graph": "other",
    "holds": "other",
    "library": {"name": "tensorrt_rtx", "version": "1.7.2"},
    "dtype": "bfloat16",
    "inputs": [["tokens", "int64", ["B", 1]]],
    "profiles": [{"name": "decode", "axes": {"B": [1, 4, 8], "L": [1, 1, 1]}}],
    "sms": (86,),
    "gpu": L4,
}


def test_every_part_of_the_identity_counts() -> None:
    assert OTHER.keys() == {f.name for f in fields(EngineIdentity)}, (
        "a new part belongs into this table"
    )
    keys = {engine_key(replace(BASE, **{name: value})) for name, value in OTHER.items()} | {
        engine_key(BASE)
    }
    assert len(keys) == len(OTHER) + 1
    gpus = [L4, replace(L4, driver="590.1"), replace(L4, sm=90), replace(L4, name="NVIDIA L40")]
    assert len({engine_key(replace(BASE, gpu=gpu)) for gpu in gpus}) == len(gpus)


def test_the_same_is_the_same() -> None:
    again = replace(BASE, library={"version": "1.7.1", "name": "tensorrt_rtx"})
    assert engine_key(again) == engine_key(BASE)
    assert len(engine_key(BASE)) == 32


def test_a_flag_of_the_builder_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine_key(BASE)
    monkeypatch.setitem(cache_keys.SETTINGS, "cleared_flags", [])
    assert engine_key(BASE) != before
