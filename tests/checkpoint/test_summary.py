"""The numbers of a model, against counts made here from headers and published sizes."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.graphs import FIXTURES
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG, SyntheticOptions, write_checkpoint
from twotower.config import ModelConfig, read_model_config
from twotower.export import Checkpoint, summarize

SMALL = read_model_config(FIXTURES / "hybrid-a" / "config.json")
# Written from the published names, apart from the package's own table of roles; the first that
# matches counts.
ROLES = {
    "routed_expert": r"\.mixer\.experts\.\d+\.",
    "shared_expert": r"\.mixer\.shared_experts\.",
    "router": r"\.mixer\.gate\.",
    "embedding": r"_tower\.embeddings\.",
    "head": r"lm_head\.",
    "conditioning": r"^(t_embedder|t_block|scale_shift_tables)\.",
    "norm": r"(layers\.\d+\.norm|norm_f)\.weight$",
    "attention": r"\.mixer\.[qkvo]_proj\.",
    "mlp": r"\.mixer\.(up|down)_proj\.",
    "mamba": r"\.mixer\.",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The published layout at its size, without content."""
    folder = tmp_path_factory.mktemp("published") / "c"
    return Checkpoint.open(
        write_checkpoint(folder, PUBLISHED_CONFIG, SyntheticOptions(headers_only=True))
    )


def header_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return header


def headers(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path in folder.glob("model*.safetensors"):
        out |= header_of(path)
    return out


def role_of(name: str) -> str:
    return next(role for role, pattern in ROLES.items() if re.search(pattern, name))


def in_context_tower(name: str) -> bool:
    return name.startswith(("context_tower.", "context_lm_head."))


def added(entries: dict[str, Any], key: Any, value: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for name, entry in entries.items():
        out[key(name)] = out.get(key(name), 0) + value(entry)
    return out


def size(entry: dict[str, Any]) -> int:
    return math.prod(entry["shape"])


def nbytes(entry: dict[str, Any]) -> int:
    return entry["data_offsets"][1] - entry["data_offsets"][0]


@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
def test_counts_are_those_of_the_headers(folder: str) -> None:
    checkpoint, entries = Checkpoint.open(FIXTURES / folder), headers(FIXTURES / folder)
    config, summary = checkpoint.config, summarize(checkpoint.config, tensors=checkpoint.tensors)
    assert summary.parameters == sum(map(size, entries.values()))
    assert summary.by_tower == added(
        entries, lambda name: "context_tower" if in_context_tower(name) else "denoiser_tower", size
    )
    assert summary.by_role == added(entries, role_of, size)
    assert summary.routed == summary.by_role["routed_expert"]
    assert summary.weight_bytes == sum(map(nbytes, entries.values()))
    assert summary.bytes_by_role == added(entries, role_of, nbytes)
    assert summary.bytes_by_dtype == {"float32": summary.weight_bytes}
    context = added({n: e for n, e in entries.items() if in_context_tower(n)}, role_of, size)
    routed, embedding = context.pop("routed_expert"), context.pop("embedding")
    chosen = routed * config.num_experts_per_tok // config.n_routed_experts
    used = sum(context.values()) + embedding // config.vocab_size + chosen
    assert summary.active == used
    assert summary.active_ratio == pytest.approx(used / summary.by_tower["context_tower"])


def test_layers_and_state_of_a_small_model_counted_by_hand() -> None:
    summary = summarize(SMALL)
    assert summary.pattern == "MEM*EME*"
    assert summary.layers == {"mamba": 3, "moe": 3, "attention": 2}
    assert summary.kv_bytes_per_token == 2 * 2 * (2 * 16) * 4, (
        "layers, keys and values, heads of 16, float32"
    )
    assert summary.state_bytes_per_row == 3 * ((8 * 16 + 2 * 2 * 16) * 3 * 4 + 8 * 16 * 16 * 4), (
        "3 columns of the convolution, the SSM"
    )


def test_the_published_model_has_its_published_numbers(published: Checkpoint) -> None:
    summary = summarize(published.config, tensors=published.tensors)
    assert summary.layers == {"mamba": 23, "moe": 23, "attention": 6}
    assert summary.parameters == pytest.approx(63.2e9, rel=1e-3)
    assert summary.weight_bytes == 2 * summary.parameters == pytest.approx(117.7 * 2**30, rel=1e-3)
    assert summary.bytes_by_dtype == {"bfloat16": summary.weight_bytes}
    assert summary.routed == 2 * 23 * 128 * 2 * 2688 * 1856
    assert summary.routed / summary.parameters == pytest.approx(0.93, abs=0.001)
    towers = summary.by_tower
    more = towers["denoiser_tower"] - towers["context_tower"]
    assert more == summary.by_role["conditioning"]
    assert summary.kv_bytes_per_token == 6 * 1024
    assert summary.state_bytes_per_row == 23 * ((64 * 64 + 2 * 8 * 128) * 3 * 2 + 64 * 64 * 128 * 4)
    assert summary.state_bytes_per_row == pytest.approx(47 * 2**20, rel=0.01)
    text = "\n".join(summary.lines())
    sizes = "118 GiB as bfloat16", "6 KiB a token", "46.8 MiB a row"
    for said in ("63.2 B total, 93.0 % in routed experts", "10.2 % of a tower", *sizes):
        assert said in text


def test_stored_dtypes_count_tensor_by_tensor(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for shard in (FIXTURES / "hybrid-a").glob("model*.safetensors"):
        tensors |= load_file(shard)
    plain = summarize(SMALL)
    head, router = "lm_head.weight", "context_tower.layers.1.mixer.gate.weight"
    tensors[head] = tensors[head].to(torch.bfloat16)
    tensors[router] = tensors[router].to(torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((FIXTURES / "hybrid-a" / "config.json").read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    mixed = summarize(checkpoint.config, tensors=checkpoint.tensors)
    assert mixed.parameters == plain.parameters
    assert mixed.bytes_by_dtype["bfloat16"] == 256 * 64 * 2
    assert mixed.bytes_by_dtype["float16"] == 8 * 64 * 2
    assert sum(mixed.bytes_by_dtype.values()) == mixed.weight_bytes
    assert sum(mixed.bytes_by_role.values()) == mixed.weight_bytes
    assert plain.weight_bytes - mixed.weight_bytes == 2 * (256 * 64 + 8 * 64)
    assert mixed.bytes_by_role["head"] == plain.bytes_by_role["head"] * 3 // 4, (
        "one of the two heads is half its size"
    )


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_without_tensors_all_is_counted_in_the_given_dtype(dtype: str, item: int) -> None:
    """The SSM state stays float32; keys, values and the convolution's columns follow the dtype."""
    summary = summarize(SMALL, dtype)
    assert summary.dtype == dtype
    assert summary.bytes_by_dtype == {dtype: summary.parameters * item}
    assert summary.kv_bytes_per_token == 128 * item
    assert summary.state_bytes_per_row == 3 * (192 * 3 * item + 8 * 16 * 16 * 4)


def test_a_model_without_experts_uses_all_of_a_tower_but_the_embedding() -> None:
    summary = summarize(ModelConfig.from_json({**SMALL.to_json(), "layers": "M*"}))
    unread = (SMALL.vocab_size - 1) * SMALL.hidden_size
    assert summary.routed == 0
    assert summary.active == summary.by_tower["context_tower"] - unread
    assert "0.0 % in routed experts" in "\n".join(summary.lines())


def test_lines_name_every_role_largest_first() -> None:
    summary = summarize(read_model_config(FIXTURES / "hybrid-b" / "config.json"))
    rows = [line for line in summary.lines() if line.split()[0] in summary.by_role]
    assert {row.split()[0] for row in rows} == set(summary.by_role)
    sizes = [summary.by_role[row.split()[0]] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert len({row.index("%") for row in rows}) == 1, "the columns are aligned"
