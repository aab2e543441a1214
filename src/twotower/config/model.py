"""The published config.json as a frozen dataclass, with every unusable field named at once."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from twotower.dtypes import FLOATS
from twotower.errors import ConfigError
from twotower.records import decode, encode

ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
MASK_TOKEN_ID = 3  # not in the published config.json; the tokenizer's [MASK] slot


class LayerKind(Enum):
    """One mixer a layer; the value is the letter of `hybrid_override_pattern`."""

    MAMBA = "M"
    MOE = "E"
    ATTENTION = "*"
    MLP = "-"


# The words newer `transformers` writes in `layers_block_type`.
_KIND_OF_WORD = {
    "mamba": LayerKind.MAMBA,
    "mamba2": LayerKind.MAMBA,
    "moe": LayerKind.MOE,
    "attention": LayerKind.ATTENTION,
    "full_attention": LayerKind.ATTENTION,
    "mlp": LayerKind.MLP,
}
# Only this value of each field has a defined meaning in the published model code.
_FIXED = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
}
# Sizes that only some layer kinds need: a model without such a layer may leave them out.
_NEEDED_BY = {
    LayerKind.MAMBA: (
        "mamba_num_heads",
        "mamba_head_dim",
        "ssm_state_size",
        "n_groups",
        "conv_kernel",
    ),
    LayerKind.ATTENTION: ("num_attention_heads", "num_key_value_heads", "head_dim"),
    LayerKind.MOE: ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    LayerKind.MLP: ("intermediate_size",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of both towers (they share everything but weights).

    Field names are those of the published config.json; but `layers` replaces
    `hybrid_override_pattern`, `time_step_limit` keeps its (lower, upper) bounds with `inf` for
    "none", and a text ends at any of `eos_token_ids`.
    """

    layers: tuple[LayerKind, ...]
    vocab_size: int
    hidden_size: int
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    n_groups: int = 1
    conv_kernel: int = 4
    use_conv_bias: bool = True
    intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    max_position_embeddings: int = 262144
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int = 0
    mask_token_id: int = MASK_TOKEN_ID
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ConfigError(
                f"the model config has {len(problems)} unusable value(s)",
                found="; ".join(problems),
                do="use the config.json published with the checkpoint, or correct the fields "
                "named above",
            )

    def _problems(self) -> list[str]:
        """Values that are of no use, or contradict one another."""
        out = self._mistyped()
        if out:
            return out
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            out.append(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if LayerKind.MAMBA in self.layers and self.mamba_num_heads % self.n_groups:
            heads = self.mamba_num_heads
            out.append(f"mamba_num_heads={heads} is not a multiple of n_groups={self.n_groups}")
        if LayerKind.MOE in self.layers:
            out += self._moe_problems()
        if not self.layers:
            out.append("no layers")
        vocabulary = f"is outside the vocabulary of {self.vocab_size}"
        if not 0 <= self.mask_token_id < self.vocab_size:
            out.append(f"mask_token_id={self.mask_token_id} {vocabulary}")
        outside = [token for token in self.eos_token_ids if token >= self.vocab_size]
        if outside:
            out.append(f"eos_token_id={outside} {vocabulary}")
        if self.dtype not in FLOATS:
            out.append(f"dtype={self.dtype!r} (allowed: {', '.join(FLOATS)})")
        return out

    def _mistyped(self) -> list[str]:
        """Values no arithmetic should be tried on: JSON gives any type to any field."""
        positive = {"vocab_size", "hidden_size"}.union(*(_NEEDED_BY[kind] for kind in self.layers))
        out = []
        for f in fields(self):
            value, number = getattr(self, f.name), "a whole number above 0"
            if f.name in positive:
                fits, expected = _is_count(value) and value > 0, number
            elif f.type == "int":
                fits, expected = _is_count(value), "a whole number, 0 or more"
            elif f.type == "float":
                fits, expected = _is_number(value) and math.isfinite(value), "a number"
            elif f.type == "bool":
                fits, expected = isinstance(value, bool), "true or false"
            elif f.type == "str":
                fits, expected = isinstance(value, str), "a word"
            else:
                continue
            if not fits:
                out.append(f"{f.name}={value!r} ({expected})")
        if not all(_is_count(token) for token in self.eos_token_ids):
            out.append(f"eos_token_id={list(self.eos_token_ids)!r} (token ids, 0 or more)")
        limit: Any = self.time_step_limit
        interval = isinstance(limit, tuple) and len(limit) == 2 and all(map(_is_number, limit))
        if not interval or not 0 <= limit[0] <= limit[1]:
            out.append(f"time_step_limit={limit!r} is not an interval")
        return out

    def _moe_problems(self) -> list[str]:
        out = []
        chosen, experts = self.num_experts_per_tok, self.n_routed_experts
        if chosen > experts:
            out.append(f"num_experts_per_tok={chosen} of only {experts} experts")
        if self.n_group < 1 or experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            groups = f"n_group={self.n_group}, topk_group={self.topk_group}"
            out.append(f"{groups} do not divide {experts} experts")
        elif chosen > self.topk_group * (experts // self.n_group):
            held = f"the {self.topk_group} chosen group(s) hold"
            out.append(f"num_experts_per_tok={chosen} is more than {held}")
        width = self.moe_shared_expert_intermediate_size
        if self.n_shared_experts not in (0, 1):
            out.append(f"n_shared_experts={self.n_shared_experts} (0 or 1)")
        elif self.n_shared_experts and not width:
            out.append(f"moe_shared_expert_intermediate_size={width!r} (a whole number above 0)")
        return out

    @property
    def mamba_inner(self) -> int:
        """Channels of x and z: H * P."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution, x and B and C side by side: H*P + 2*G*N."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def shared_intermediate(self) -> int:
        """Width of the shared expert, 0 where the model has none."""
        return self.moe_shared_expert_intermediate_size if self.n_shared_experts else 0

    @property
    def pattern(self) -> str:
        """The layers as letters, e.g. `MEM*EME*`."""
        return "".join(kind.value for kind in self.layers)

    def indices(self, kind: LayerKind) -> tuple[int, ...]:
        """Positions of the layers of one kind, ascending."""
        return tuple(i for i, other in enumerate(self.layers) if other is kind)

    def truncated(self, layers: int) -> ModelConfig:
        """The same model with only its first `layers` layers."""
        return replace(self, layers=self.layers[:layers])

    def to_json(self) -> dict[str, Any]:
        """A strict-JSON form that `from_json` reads back."""
        limit = [None if math.isinf(x) else x for x in self.time_step_limit]
        return {**encode(self), "layers": self.pattern, "time_step_limit": limit}

    @classmethod
    def from_json(cls, data: Any) -> ModelConfig:
        """The inverse of `to_json`; unknown keys are an error."""
        where, known = "the model section of the bundle", {f.name for f in fields(cls)}
        entries = decode(dict[str, Any], data)
        unusable = sorted(key for key in entries if key not in known or entries[key] is None)
        if unusable:
            raise ConfigError(
                f"{where} is not readable",
                found=f"unknown or empty keys {unusable}; allowed: {', '.join(sorted(known))}",
                do="export the checkpoint again with this version of twotower",
            )
        published = {"hybrid_override_pattern": entries.get("layers")}
        if "eos_token_ids" in entries:
            published["eos_token_id"] = entries["eos_token_ids"]
        return _from_published(entries | published, where)


def read_model_config(path: Path) -> ModelConfig:
    """Reads a published config.json (`Infinity` is accepted, as the published file holds it).

    ConfigError if it is missing, not JSON, of another architecture, or has unusable values.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"cannot read {path}", found=str(e), do="name the folder that holds config.json"
        ) from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(
            f"{path} is not JSON",
            found=str(e),
            do="download the file again",
        ) from e
    return parse_model_config(raw, str(path))


def parse_model_config(raw: object, name: str) -> ModelConfig:
    """The config in a parsed config.json, or ConfigError; `name` says in errors whose it is."""
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{name} is not a model config",
            found=f"a {type(raw).__name__}",
            do="expect a JSON object",
        )
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
        raise ConfigError(
            f"{name} describes another model",
            found=f"architectures {architectures}; this tool exports {ARCHITECTURE}",
            do="name a Nemotron-Labs-TwoTower checkpoint",
        )
    return _from_published(raw, name)


def _from_published(raw: dict[str, Any], path: str) -> ModelConfig:
    values: dict[str, Any] = {"layers": published_layers(raw, path)}
    wrong = []
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            wrong.append(f"{name}={raw[name]!r} (only {value!r} is defined)")
    if raw.get("tie_word_embeddings"):
        wrong.append("tie_word_embeddings=true (the towers are untied)")
    if wrong:
        raise ConfigError(
            f"{path} sets options this architecture does not support",
            found="; ".join(wrong),
            do="use the published config.json",
        )
    for f in fields(ModelConfig):
        if raw.get(f.name) is not None and f.name not in values:
            values[f.name] = raw[f.name]
    ends = raw.get("eos_token_id", 2)
    values["eos_token_ids"] = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    values["time_step_limit"] = step_interval(raw.get("time_step_limit"))
    values["dtype"] = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
    missing = [k for k in ("vocab_size", "hidden_size") if k not in values]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}",
            found=f"{len(raw)} fields",
            do="use the published config.json",
        )
    return ModelConfig(**values)


def step_interval(value: Any) -> Any:
    """(lower, upper) with None for "no bound"; what is no interval comes back for the check."""
    if value is None:
        return 0.0, math.inf
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not pair or not all(x is None or _is_number(x) for x in value):
        return value
    low, high = value
    return float(low or 0.0), math.inf if high is None else float(high)


def published_layers(raw: dict[str, Any], path: str) -> tuple[LayerKind, ...]:
    pattern, words = raw.get("hybrid_override_pattern"), raw.get("layers_block_type")
    letters = {kind.value: kind for kind in LayerKind}
    if isinstance(pattern, str):
        names, table = list(pattern), letters
    elif isinstance(words, list):
        names, table = words, {**_KIND_OF_WORD, **letters}
    else:
        raise ConfigError(
            f"{path} does not say what its layers are",
            found="neither hybrid_override_pattern nor layers_block_type",
            do="use the published config.json",
        )
    unknown = []
    for i, name in enumerate(names):
        if not isinstance(name, str) or name not in table:
            unknown.append(f"{name!r} at layer {i}")
    if unknown:
        raise ConfigError(
            f"{path} names layer kinds this tool does not know",
            found=f"{', '.join(unknown[:8])}; allowed: {', '.join(map(repr, table))}",
            do="correct hybrid_override_pattern (M Mamba-2, E MoE, * attention, - MLP)",
        )
    count = raw.get("num_hidden_layers", len(names))
    if count != len(names):
        raise ConfigError(
            f"{path} disagrees with itself about the number of layers",
            found=f"num_hidden_layers {count}, but {len(names)} layer kinds",
            do="use the published config.json",
        )
    return tuple(table[name] for name in names)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
