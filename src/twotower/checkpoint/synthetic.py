"""Checkpoints with random weights in the published layout, of any size, written in one stream."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.checkpoint.layout import CheckpointTensor, Role, expected_tensors
from twotower.checkpoint.reader import INDEX_FILE
from twotower.config.model import parse_model_config
from twotower.dtypes import DTYPES, item_bytes, to_stored
from twotower.errors import CheckpointError

PUBLISHED_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "hidden_size": 2688,
    "vocab_size": 131072,
    "layer_norm_epsilon": 1e-5,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "mamba_hidden_act": "silu",
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "intermediate_size": 1856,
    "mlp_hidden_act": "relu2",
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "tie_word_embeddings": False,
    "chunk_size": 128,
    "max_position_embeddings": 262144,
    "time_step_limit": [0.0, math.inf],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
"""The published model's config.json."""

# Elements drawn once and repeated: to draw 30 billion numbers takes longer than to write them.
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticOptions:
    """How a synthetic checkpoint is written.

    `headers_only` gives files their full size without content (sparse), for what reads headers
    alone.
    """

    seed: int = 0
    shards: int = 2
    headers_only: bool = False


def published_slice(pattern: str) -> dict[str, Any]:
    """The published config with other layers: real widths at a fraction of the size."""
    return {
        **PUBLISHED_CONFIG,
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
    }


def write_checkpoint(
    folder: Path, config_json: dict[str, Any], options: SyntheticOptions | None = None
) -> Path:
    """Writes a checkpoint with random weights of sane magnitude in less than 200 MiB of memory.

    The `torch_dtype` of `config_json` is that of the weights.

    Raises:
        CheckpointError: the folder exists.
        ConfigError: the config is unusable; no folder is made.
    """
    how = options or SyntheticOptions()
    if folder.exists():
        raise CheckpointError(
            f"'{folder}' exists already",
            found="a synthetic checkpoint never overwrites",
            do="name a new folder",
        )
    config = parse_model_config(config_json, "the synthetic checkpoint's config")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json, indent=1))
    tensors = list(expected_tensors(config).values())
    random = None
    if not how.headers_only:
        random = np.random.default_rng(how.seed).standard_normal(_BLOCK, dtype=np.float32)
    weight_map = {}
    ends = [shard * len(tensors) // how.shards for shard in range(how.shards + 1)]
    for shard in range(how.shards):
        name = f"model-{shard + 1:05d}-of-{how.shards:05d}.safetensors"
        members = tensors[ends[shard] : ends[shard + 1]]
        weight_map.update({t.name: name for t in members})
        _write_shard(folder / name, members, config.dtype, random)
    size = sum(math.prod(t.shape) for t in tensors) * item_bytes(config.dtype)
    (folder / INDEX_FILE).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    return folder


def _write_shard(
    path: Path, members: list[CheckpointTensor], dtype: str, random: np.ndarray[Any, Any] | None
) -> None:
    header: dict[str, Any] = {}
    end = 0
    for tensor in members:
        size = math.prod(tensor.shape) * item_bytes(dtype)
        header[tensor.name] = {
            "dtype": DTYPES[dtype].safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if random is None:
            file.truncate(8 + len(text) + end)
            return
        for number, tensor in enumerate(members):
            for piece in _values(tensor, random, start=number * 7919):
                to_stored(piece, dtype).tofile(file)


def _values(
    tensor: CheckpointTensor, random: np.ndarray[Any, Any], *, start: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Float32 pieces, like trained weights as far as finite and varied results need it."""
    count, last = math.prod(tensor.shape), tensor.name.rsplit(".", 1)[-1]
    if last == "A_log":
        yield np.log(np.linspace(1, 16, count, dtype=np.float32))
    elif last == "dt_bias":
        yield np.log(np.expm1(np.geomspace(1e-3, 1e-1, count))).astype(np.float32)
    elif last == "D" or tensor.role is Role.NORM or tensor.name.endswith("mixer.norm.weight"):
        yield np.ones(count, np.float32)
    else:
        if last == "e_score_correction_bias":
            scale = 0.01
        elif tensor.role is Role.EMBEDDING:
            scale = 1.0
        elif tensor.role is Role.HEAD:  # sharp enough that some predictions are confident
            scale = 3.0 / math.sqrt(tensor.shape[-1])
        elif len(tensor.shape) > 1:
            scale = 1.0 / math.sqrt(math.prod(tensor.shape[1:]) or 1)
        else:
            scale = 0.02
        at = start % len(random)
        while count:
            piece = random[at : at + count]
            yield piece * np.float32(scale)
            count, at = count - len(piece), 0
