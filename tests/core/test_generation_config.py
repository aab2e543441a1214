"""Generation options are checked when they are made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from twotower.config import GenerationConfig
from twotower.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", (0, -3, 2.0, True)),
        ("block_size", (0,)),
        ("steps_per_block", (0,)),
        ("confidence_threshold", (1.5, math.nan)),
        ("temperature", (-0.1, math.nan, math.inf)),
        ("top_k", (65, -1)),
        ("seed", (-1, 2**64, 1.0, True, "7")),
        ("mode", ("beam",)),
        ("stop", (("",),)),
        ("top_p", (0.5,)),
        ("ignore_eos", (1,)),
    ],
)
def test_what_cannot_be_used_is_named(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            GenerationConfig(**{name: value})
        assert name in caught.value.what
        assert "allowed" in caught.value.found
        assert isinstance(caught.value, ValueError)


def test_the_published_defaults() -> None:
    c = GenerationConfig()
    assert (c.block_size, c.steps_per_block, c.max_new_tokens) == (16, 16, 128)
    assert (c.confidence_threshold, c.temperature) == (0.9, 0.0)


@pytest.mark.parametrize("mode", ["diffusion", "auto"])
def test_top_p_needs_a_mode_that_is_certainly_autoregressive(mode: str) -> None:
    assert GenerationConfig(mode=mode).mode == mode
    with pytest.raises(ConfigError, match="top_p") as caught:
        GenerationConfig(mode=mode, top_p=0.9)
    assert f"1 in {mode} mode" in caught.value.found


def test_unknown_options_are_an_error_and_known_ones_override() -> None:
    base = GenerationConfig(seed=7)
    assert GenerationConfig.from_mapping({"max_new_tokens": 3}, base=base) == GenerationConfig(
        seed=7, max_new_tokens=3
    )
    with pytest.raises(ConfigError, match="n_beams"):
        GenerationConfig.from_mapping({"n_beams": 3})
    with pytest.raises(ConfigError):
        GenerationConfig.from_mapping({"max_new_tokens": 0})


def test_plain_form_reads_back() -> None:
    config = GenerationConfig(mode="ar", top_p=0.9, stop=["a", "b"], temperature=1.0)  # type: ignore[arg-type]
    assert config.stop == ("a", "b")
    assert GenerationConfig.from_mapping(config.to_json()) == config
    assert GenerationConfig.from_mapping({**config.to_json(), "seed": 2**64 - 1}).seed == 2**64 - 1
    assert GenerationConfig(stop="end").stop == ("end",)  # type: ignore[arg-type]


def test_a_seed_is_none_until_it_is_given() -> None:
    assert GenerationConfig().seed is None
    assert GenerationConfig.from_mapping({"seed": None}, base=GenerationConfig(seed=7)).seed is None
    assert GenerationConfig().seeded() == GenerationConfig(seed=0)
    assert GenerationConfig().seeded(5) == GenerationConfig(seed=5)
    assert GenerationConfig(seed=7).seeded(5) == GenerationConfig(seed=7)
