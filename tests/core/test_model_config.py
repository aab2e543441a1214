"""Reading the published config.json: what is accepted, and what every refusal says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.graphs import FIXTURES
from twotower.checkpoint.layout import Role, Tower, expected_tensors
from twotower.config import LayerKind, ModelConfig, read_model_config
from twotower.config.model import parse_model_config
from twotower.errors import ConfigError

PUBLISHED = json.loads((FIXTURES / "hybrid-a" / "config.json").read_text())

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def written(tmp_path: Path, **changes: Any) -> Path:
    data = {k: v for k, v in {**PUBLISHED, **changes}.items() if v is not None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    return path


def test_infinity_is_accepted_as_the_published_file_writes_it() -> None:
    path = FIXTURES / "hybrid-a" / "config.json"
    assert "Infinity" in path.read_text()
    assert read_model_config(path).time_step_limit == (0.0, math.inf)
    nulls = {**PUBLISHED, "n_group": None, "time_step_limit": None}
    assert parse_model_config(nulls, "config").time_step_limit == (0.0, math.inf)


def test_layers_block_type_means_the_same_as_the_pattern(tmp_path: Path) -> None:
    words = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    spelled = written(
        tmp_path, hybrid_override_pattern=None, layers_block_type=[words[c] for c in "MEM*EME*"]
    )
    assert read_model_config(spelled) == read_model_config(FIXTURES / "hybrid-a" / "config.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hybrid_override_pattern": "MEMXEME*"}, "'X' at layer 3"),
        ({"hybrid_override_pattern": "MEMXEME*"}, "'M', 'E', '*', '-'"),
        ({"hybrid_override_pattern": None}, "neither"),
        ({"num_hidden_layers": 9}, "num_hidden_layers 9"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"mlp_hidden_act": "gelu"}, "gelu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"n_groups": 3}, "n_groups=3"),
        ({"n_group": 3}, "n_group=3"),
        ({"torch_dtype": "float8"}, "float8"),
        ({"vocab_size": 3}, "mask_token_id=3"),
        ({"time_step_limit": 3}, "time_step_limit"),
        ({"time_step_limit": [1]}, "time_step_limit"),
        ({"time_step_limit": ["a", "b"]}, "time_step_limit"),
        ({"time_step_limit": [2, 1]}, "time_step_limit"),
        ({"torch_dtype": ["float32"]}, "dtype"),
        ({"layers_block_type": [["mamba"]], "hybrid_override_pattern": None}, "at layer 0"),
        ({"architectures": 5}, "architectures 5"),
        ({"eos_token_id": ["two"]}, "eos_token_id"),
        ({"eos_token_id": [2, 10**6]}, "outside the vocabulary"),
        ({"routed_scaling_factor": "high"}, "routed_scaling_factor"),
        ({"norm_topk_prob": 3}, "norm_topk_prob"),
        ({"num_key_value_heads": "two"}, "num_key_value_heads"),
        ({"n_shared_experts": [1]}, "n_shared_experts"),
    ],
)
def test_unusable_fields_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model_config(written(tmp_path, **changes))
    assert named in str(caught.value)
    assert caught.value.found
    assert caught.value.do


def test_all_unusable_fields_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model_config(written(tmp_path, hidden_size=-1, conv_kernel=0, head_dim=1.5))
    assert all(
        field in caught.value.found for field in ("hidden_size=-1", "conv_kernel=0", "head_dim=1.5")
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 200_000])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        read_model_config(tmp_path / "config.json")
    with pytest.raises(ConfigError):
        read_model_config(tmp_path / "missing.json")


@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
def test_json_form_reads_back_and_names_unknown_keys(folder: str) -> None:
    config = read_model_config(FIXTURES / folder / "config.json")
    strict = json.loads(json.dumps(config.to_json(), allow_nan=False))
    assert ModelConfig.from_json(strict) == config
    with pytest.raises(ConfigError, match="not readable"):
        ModelConfig.from_json({**strict, "surprise": 1})


@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
def test_tensor_table_is_the_fixtures_own(folder: str) -> None:
    stored = json.loads((FIXTURES / folder / "model.safetensors.index.json").read_text())
    config = read_model_config(FIXTURES / folder / "config.json")
    table = expected_tensors(config)
    assert set(table) == set(stored["weight_map"])
    assert {t.tower for t in table.values()} == set(Tower)
    experts = 2 * 2 * config.n_routed_experts * len(config.indices(LayerKind.MOE))
    assert sum(t.role is Role.ROUTED_EXPERT for t in table.values()) == experts
    assert all(t.tower is Tower.DENOISER for t in table.values() if t.role is Role.CONDITIONING)


@pytest.mark.slow
@given(field=st.sampled_from(sorted(PUBLISHED)), value=JSON_VALUES)
def test_no_value_of_a_field_raises_anything_else(field: str, value: Any) -> None:
    try:
        parse_model_config({**PUBLISHED, field: value}, "config")
    except ConfigError as e:
        assert e.found
        assert e.do
