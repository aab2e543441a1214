"""The published layout as data: every name and shape a two-tower checkpoint must hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from twotower.config.model import LayerKind, ModelConfig

TIMESTEP_FREQUENCIES = 128
"""Sinusoids of the time-step embedding: the embedder's first layer reads twice as many values."""


class Tower(Enum):
    """The two networks; the value is the prefix of their tensors."""

    CONTEXT = "context_tower"
    DENOISER = "denoiser_tower"

    @property
    def head(self) -> str:
        """The name of the tower's output projection."""
        return "context_lm_head.weight" if self is Tower.CONTEXT else "lm_head.weight"


class Role(Enum):
    """What a tensor is for: the unit in which parameters are counted and precision is chosen."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    MAMBA = "mamba"
    ATTENTION = "attention"
    ROUTER = "router"
    ROUTED_EXPERT = "routed_expert"
    SHARED_EXPERT = "shared_expert"
    MLP = "mlp"
    CONDITIONING = "conditioning"


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of the published layout; conditioning belongs to the denoiser."""

    name: str
    shape: tuple[int, ...]
    role: Role
    tower: Tower


def layer_tensors(config: ModelConfig, tower: Tower, layer: int) -> Iterator[CheckpointTensor]:
    """The tensors under `<tower>.layers.<layer>.`, in a fixed order."""
    prefix = f"{tower.value}.layers.{layer}."
    yield CheckpointTensor(
        f"{prefix}norm.weight",
        (config.hidden_size,),
        Role.NORM,
        tower,
    )
    for name, shape, role in _MIXERS[config.layers[layer]](config):
        yield CheckpointTensor(
            f"{prefix}mixer.{name}",
            shape,
            role,
            tower,
        )


def expected_tensors(config: ModelConfig) -> dict[str, CheckpointTensor]:
    """Every tensor of both towers by name."""
    out: list[CheckpointTensor] = []
    v, d = config.vocab_size, config.hidden_size
    for tower in Tower:
        out.append(
            CheckpointTensor(
                f"{tower.value}.embeddings.weight",
                (v, d),
                Role.EMBEDDING,
                tower,
            )
        )
        for layer in range(len(config.layers)):
            out += layer_tensors(config, tower, layer)
        out.append(
            CheckpointTensor(
                f"{tower.value}.norm_f.weight",
                (d,),
                Role.NORM,
                tower,
            )
        )
        out.append(
            CheckpointTensor(
                tower.head,
                (v, d),
                Role.HEAD,
                tower,
            )
        )
    conditioning: list[tuple[str, tuple[int, ...]]] = [
        ("t_embedder.mlp.0.weight", (d, 2 * TIMESTEP_FREQUENCIES)),
        ("t_embedder.mlp.0.bias", (d,)),
        ("t_embedder.mlp.2.weight", (d, d)),
        ("t_embedder.mlp.2.bias", (d,)),
        ("t_block.1.weight", (3 * d, d)),
        ("t_block.1.bias", (3 * d,)),
        *((f"scale_shift_tables.{i}", (3, d)) for i in range(len(config.layers))),
    ]
    out += [CheckpointTensor(n, s, Role.CONDITIONING, Tower.DENOISER) for n, s in conditioning]
    return {t.name: t for t in out}


_Row = tuple[str, tuple[int, ...], Role]


def _mamba(c: ModelConfig) -> Iterator[_Row]:
    h, inner, conv = c.mamba_num_heads, c.mamba_inner, c.conv_channels
    yield "in_proj.weight", (inner + conv + h, c.hidden_size), Role.MAMBA
    yield "conv1d.weight", (conv, 1, c.conv_kernel), Role.MAMBA
    if c.use_conv_bias:
        yield "conv1d.bias", (conv,), Role.MAMBA
    for name in ("dt_bias", "A_log", "D"):
        yield name, (h,), Role.MAMBA
    yield "norm.weight", (inner,), Role.MAMBA
    yield "out_proj.weight", (c.hidden_size, inner), Role.MAMBA


def _attention(c: ModelConfig) -> Iterator[_Row]:
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield "q_proj.weight", (q, c.hidden_size), Role.ATTENTION
    yield "k_proj.weight", (kv, c.hidden_size), Role.ATTENTION
    yield "v_proj.weight", (kv, c.hidden_size), Role.ATTENTION
    yield "o_proj.weight", (c.hidden_size, q), Role.ATTENTION


def _moe(c: ModelConfig) -> Iterator[_Row]:
    d, f, shared = c.hidden_size, c.moe_intermediate_size, c.shared_intermediate
    yield "gate.weight", (c.n_routed_experts, d), Role.ROUTER
    yield "gate.e_score_correction_bias", (c.n_routed_experts,), Role.ROUTER
    for j in range(c.n_routed_experts):
        yield f"experts.{j}.up_proj.weight", (f, d), Role.ROUTED_EXPERT
        yield f"experts.{j}.down_proj.weight", (d, f), Role.ROUTED_EXPERT
    if shared:
        yield "shared_experts.up_proj.weight", (shared, d), Role.SHARED_EXPERT
        yield "shared_experts.down_proj.weight", (d, shared), Role.SHARED_EXPERT


def _mlp(c: ModelConfig) -> Iterator[_Row]:
    yield "up_proj.weight", (c.intermediate_size, c.hidden_size), Role.MLP
    yield "down_proj.weight", (c.hidden_size, c.intermediate_size), Role.MLP


_MIXERS = {
    LayerKind.MAMBA: _mamba,
    LayerKind.ATTENTION: _attention,
    LayerKind.MOE: _moe,
    LayerKind.MLP: _mlp,
}
