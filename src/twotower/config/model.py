"""The published config.json as a frozen dataclass, with every unusable field named at once."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from twotower.dtypes import FLOATS
from twotower.errors import ConfigError

__all__ = ["LayerKind", "ModelConfig", "parse_model_config", "read_model_config"]

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

    Field names are those of the published config.json, so that a reader of one knows the other.
    `layers` replaces `hybrid_override_pattern`, `time_step_limit` keeps its (lower, upper) bounds
    with `inf` for "none", and a text ends at any of `eos_token_ids`.
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
        problems = list(_problems(self))
        if problems:
            raise ConfigError(
                f"the model config has {len(problems)} unusable value(s)",
                found="; ".join(problems),
                do="use the config.json published with the checkpoint, or correct the fields named above",
            )

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
        return ModelConfig(**{**_plain(self), "layers": self.layers[:layers]})

    def to_json(self) -> dict[str, Any]:
        """A strict-JSON form that `from_json` reads back."""
        out = _plain(self)
        out["layers"] = self.pattern
        out["time_step_limit"] = [None if math.isinf(x) else x for x in self.time_step_limit]
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`; unknown keys are an error."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown or not isinstance(data.get("layers"), str):
            raise ConfigError(
                "the model section of the bundle is not readable",
                found=f"unknown keys {unknown}, layers {data.get('layers')!r}; allowed keys: {', '.join(sorted(known))}",
                do="export the checkpoint again with this version of twotower",
            )
        read = {
            "layers": _layers(
                {"hybrid_override_pattern": data["layers"]}, "the model section of the bundle"
            )
        }
        if "time_step_limit" in data:
            read["time_step_limit"] = _interval(data["time_step_limit"])
        if "eos_token_ids" in data:
            read["eos_token_ids"] = _as_tuple(data["eos_token_ids"])
        return cls(**{**data, **read})


def read_model_config(path: Path) -> ModelConfig:
    """Reads a published config.json (`Infinity` is accepted, as the published file holds it).

    Raises:
        ConfigError: the file is missing, not JSON, of another architecture, or has unusable values.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(
            f"cannot read {path}", found=str(e), do="name the folder that holds config.json"
        ) from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not JSON", found=str(e), do="download the file again") from e
    return parse_model_config(raw, str(path))


def parse_model_config(raw: object, name: str) -> ModelConfig:
    """The config in a parsed config.json; `name` says in errors where it is from.

    Raises:
        ConfigError: it is of another architecture or has unusable values.
    """
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
    values: dict[str, Any] = {"layers": _layers(raw, path)}
    wrong = [
        f"{k}={raw[k]!r} (only {v!r} is defined)" for k, v in _FIXED.items() if raw.get(k, v) != v
    ]
    if raw.get("tie_word_embeddings"):
        wrong.append("tie_word_embeddings=true (the towers are untied)")
    if wrong:
        raise ConfigError(
            f"{path} asks for mathematics this model does not have",
            found="; ".join(wrong),
            do="use the published config.json",
        )
    for f in fields(ModelConfig):
        if raw.get(f.name) is not None and f.name not in values:
            values[f.name] = raw[f.name]
    values["eos_token_ids"] = _as_tuple(raw.get("eos_token_id", 2))
    values["time_step_limit"] = _interval(raw.get("time_step_limit"))
    values["dtype"] = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
    missing = [k for k in ("vocab_size", "hidden_size") if k not in values]
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}",
            found=f"{len(raw)} fields",
            do="use the published config.json",
        )
    return ModelConfig(**values)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _interval(value: Any) -> Any:
    """(lower, upper) with None for "no bound"; anything else comes back as it is, for the check to name."""
    if value is None:
        return 0.0, math.inf
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(x is None or _is_number(x) for x in value)
    ):
        return value
    low, high = value
    return float(low or 0.0), math.inf if high is None else float(high)


def _layers(raw: dict[str, Any], path: str) -> tuple[LayerKind, ...]:
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
    unknown = [
        f"{name!r} at layer {i}"
        for i, name in enumerate(names)
        if not isinstance(name, str) or name not in table
    ]
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


def _problems(c: ModelConfig) -> list[str]:
    needed = {"vocab_size", "hidden_size"}
    for kind in Counter(c.layers):
        needed.update(_NEEDED_BY[kind])
    out = [
        f"{k}={getattr(c, k)!r} (a whole number above 0)"
        for k in sorted(needed)
        if not _is_positive(getattr(c, k))
    ]
    out += _mistyped(c, needed)
    if out:
        return out
    if c.num_key_value_heads and c.num_attention_heads % c.num_key_value_heads:
        out.append(
            f"num_attention_heads={c.num_attention_heads} is not a multiple of num_key_value_heads={c.num_key_value_heads}"
        )
    if LayerKind.MAMBA in c.layers and c.mamba_num_heads % c.n_groups:
        out.append(
            f"mamba_num_heads={c.mamba_num_heads} is not a multiple of n_groups={c.n_groups}"
        )
    if LayerKind.MOE in c.layers:
        out += _moe_problems(c)
    if not c.layers:
        out.append("no layers")
    if not 0 <= c.mask_token_id < c.vocab_size:
        out.append(f"mask_token_id={c.mask_token_id} is outside the vocabulary of {c.vocab_size}")
    outside = [token for token in c.eos_token_ids if token >= c.vocab_size]
    if outside:
        out.append(f"eos_token_id={outside} is outside the vocabulary of {c.vocab_size}")
    if c.dtype not in FLOATS:
        out.append(f"dtype={c.dtype!r} (allowed: {', '.join(FLOATS)})")
    return out


def _mistyped(c: ModelConfig, checked: set[str]) -> list[str]:
    """Values no arithmetic should be tried on: JSON gives any type to any field."""
    out = []
    for f in fields(c):
        value = getattr(c, f.name)
        if f.name in checked:
            continue
        if f.type == "int" and not _is_count(value):
            out.append(f"{f.name}={value!r} (a whole number, 0 or more)")
        elif f.type == "float" and not (_is_number(value) and math.isfinite(value)):
            out.append(f"{f.name}={value!r} (a number)")
        elif f.type == "bool" and not isinstance(value, bool):
            out.append(f"{f.name}={value!r} (true or false)")
        elif f.type == "str" and not isinstance(value, str):
            out.append(f"{f.name}={value!r} (a word)")
    if not all(_is_count(token) for token in c.eos_token_ids):
        out.append(f"eos_token_id={list(c.eos_token_ids)!r} (token ids, 0 or more)")
    limit = c.time_step_limit
    if not (
        isinstance(limit, tuple)
        and len(limit) == 2
        and all(_is_number(x) for x in limit)
        and 0 <= limit[0] <= limit[1]
    ):
        out.append(f"time_step_limit={limit!r} is not an interval")
    return out


def _moe_problems(c: ModelConfig) -> list[str]:
    out = []
    if c.num_experts_per_tok > c.n_routed_experts:
        out.append(
            f"num_experts_per_tok={c.num_experts_per_tok} of only {c.n_routed_experts} experts"
        )
    if c.n_group < 1 or c.n_routed_experts % c.n_group or not 1 <= c.topk_group <= c.n_group:
        out.append(
            f"n_group={c.n_group}, topk_group={c.topk_group} do not divide {c.n_routed_experts} experts"
        )
    elif c.num_experts_per_tok > c.topk_group * (c.n_routed_experts // c.n_group):
        out.append(
            f"num_experts_per_tok={c.num_experts_per_tok} is more than the {c.topk_group} chosen group(s) hold"
        )
    if c.n_shared_experts not in (0, 1):
        out.append(f"n_shared_experts={c.n_shared_experts} (0 or 1)")
    elif c.n_shared_experts and not _is_positive(c.moe_shared_expert_intermediate_size):
        out.append(
            f"moe_shared_expert_intermediate_size={c.moe_shared_expert_intermediate_size!r} (a whole number above 0)"
        )
    return out


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: object) -> bool:
    return _is_count(value) and bool(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(config: ModelConfig) -> dict[str, Any]:
    out = asdict(config)
    out["layers"] = config.layers
    return out
