"""The graph contract as data: every input and output of the three graphs, named once.

Axis letters: B rows, L chunk length, S block size, T context capacity; whole numbers are fixed by
the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twotower.config.generation import CANDIDATES
from twotower.config.model import LayerKind, ModelConfig
from twotower.records import decode

CONTEXT, CONTEXT_HEAD, DENOISER = "context", "context_head", "denoiser"
TOKENS, CHUNK_LENGTH, PAST_LENGTH, HIDDEN = "tokens", "chunk_length", "past_length", "hidden"
CANDIDATE_IDS, CANDIDATE_LOGPROBS = "candidate_ids", "candidate_logprobs"
BLOCK, CONTEXT_LENGTH = "block", "context_length"
THRESHOLD, COMMIT_FLOOR = "threshold", "commit_floor"
TEMPERATURE, NOISE = "temperature", "noise"
NEXT_BLOCK, PREDICTED = "next_block", "predicted"
CONFIDENCE, MASKED_LEFT = "confidence", "masked_left"

# Between the segments of a tower that was cut into several engines: the residual stream, and the
# denoiser's conditioning.
RESIDUAL_IN, RESIDUAL_OUT, CONDITIONING = "residual_in", "residual_out", "conditioning"

# Between a program and the kernels of the experts after it: the mixer's input [B,L,D], every
# expert's share of every token [experts,N], and the sum that the kernels write [B,L,D], the shared
# expert included.
EXPERTS_IN, SHARES, EXPERTS_OUT = "experts_in", "shares", "experts_out"

MAX_CHUNK = 256
"""Longest chunk the context graph reads: the masked decay matrix of a chunk is L x L a head."""

Axis = str | int


def past_key(layer: int) -> str:
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    return f"past_key_values.{layer}.value"


def past_conv(layer: int) -> str:
    return f"past_conv.{layer}"


def past_ssm(layer: int) -> str:
    return f"past_ssm.{layer}"


def present_key(layer: int) -> str:
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    return f"present.{layer}.value"


def present_conv(layer: int) -> str:
    return f"present_conv.{layer}"


def present_ssm(layer: int) -> str:
    return f"present_ssm.{layer}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One graph input or output; letters are dynamic axes, whole numbers fixed ones.

    `dtype` is `int64`, `float32`, `float16` or `bfloat16`.
    """

    name: str
    dtype: str
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape when the letters take these sizes."""
        return tuple(sizes[a] if isinstance(a, str) else a for a in self.axes)

    def with_sizes(self, sizes: Mapping[str, int]) -> TensorSpec:
        """The same with these axes made constants."""
        axes = tuple(sizes.get(a, a) if isinstance(a, str) else a for a in self.axes)
        return TensorSpec(self.name, self.dtype, axes)

    def to_json(self) -> list[Any]:
        """Name, dtype and axes, as stored in a bundle."""
        return [self.name, self.dtype, list(self.axes)]

    @classmethod
    def from_json(cls, data: Any) -> TensorSpec:
        """The inverse of `to_json`."""
        return cls(*decode(tuple[str, str, tuple[Axis, ...]], data))


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor a row carries from chunk to chunk, under its input and its output name.

    `in_place`: both names share one buffer (keys and values); else two alternate, as the old state
    is still read while the new one is written (convolution and SSM states).
    """

    past: TensorSpec
    present: TensorSpec
    in_place: bool


@dataclass(frozen=True, slots=True)
class TowerSignature:
    """Inputs and outputs of one graph, in graph order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def tensor(self, name: str) -> TensorSpec:
        """The input or output of that name; KeyError if the graph has none."""
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise KeyError(name)

    def with_sizes(self, sizes: Mapping[str, int]) -> TowerSignature:
        """The same with these axes made constants."""
        inputs = tuple(spec.with_sizes(sizes) for spec in self.inputs)
        return TowerSignature(
            self.name, inputs, tuple(spec.with_sizes(sizes) for spec in self.outputs)
        )


def candidate_count(config: ModelConfig) -> int:
    """K: candidates a position keeps; fewer than 64 only for a vocabulary smaller than that."""
    return min(CANDIDATES, config.vocab_size - 1)


def splits_groups(config: ModelConfig) -> bool:
    """Whether the context's attention takes every head of keys as a row of its own.

    TensorRT for RTX then copies keys and values once, else once for every query head. It has no
    kernel for one position of fewer than 4 query heads.
    """
    groups = config.num_key_value_heads
    return groups > 1 and config.num_attention_heads // groups >= 4


def state_tensors(config: ModelConfig, dtype: str) -> tuple[StateTensor, ...]:
    """The context state in layer order: keys, values and conv in `dtype`, SSM always float32."""
    out = []
    kv: tuple[Axis, ...] = ("B", config.num_key_value_heads, "T", config.head_dim)
    conv: tuple[Axis, ...] = ("B", config.conv_kernel - 1, config.conv_channels)
    heads = config.mamba_num_heads
    ssm: tuple[Axis, ...] = ("B", heads, config.mamba_head_dim, config.ssm_state_size)
    for i, kind in enumerate(config.layers):
        tensors: list[tuple[str, str, str, tuple[Axis, ...]]] = []
        if kind is LayerKind.ATTENTION:
            tensors.append((past_key(i), present_key(i), dtype, kv))
            tensors.append((past_value(i), present_value(i), dtype, kv))
        elif kind is LayerKind.MAMBA:
            tensors.append((past_conv(i), present_conv(i), dtype, conv))
            tensors.append((past_ssm(i), present_ssm(i), "float32", ssm))
        for past, present, stored_as, axes in tensors:
            pair = TensorSpec(past, stored_as, axes), TensorSpec(present, stored_as, axes)
            out.append(StateTensor(*pair, in_place=kind is LayerKind.ATTENTION))
    return tuple(out)


def context_signature(config: ModelConfig, dtype: str) -> TowerSignature:
    """The context graph: a right-padded chunk in, the next state and last hidden vectors out."""
    state = state_tensors(config, dtype)
    return TowerSignature(
        CONTEXT,
        (
            TensorSpec(TOKENS, "int64", ("B", "L")),
            TensorSpec(CHUNK_LENGTH, "int64", ("B",)),
            TensorSpec(PAST_LENGTH, "int64", ("B",)),
            *(s.past for s in state),
        ),
        (TensorSpec(HIDDEN, dtype, ("B", config.hidden_size)), *(s.present for s in state)),
    )


def head_signature(config: ModelConfig, dtype: str) -> TowerSignature:
    """The context head: hidden vectors in, the K best tokens and their log-probabilities out."""
    k = candidate_count(config)
    return TowerSignature(
        CONTEXT_HEAD,
        (TensorSpec(HIDDEN, dtype, ("B", config.hidden_size)),),
        (
            TensorSpec(CANDIDATE_IDS, "int64", ("B", k)),
            TensorSpec(CANDIDATE_LOGPROBS, "float32", ("B", k)),
        ),
    )


def denoiser_signature(config: ModelConfig, dtype: str) -> TowerSignature:
    """The denoiser graph: a denoising step with its sampler; the context state is only read."""
    return TowerSignature(
        DENOISER,
        (
            TensorSpec(BLOCK, "int64", ("B", "S")),
            TensorSpec(CONTEXT_LENGTH, "int64", ("B",)),
            TensorSpec(THRESHOLD, "float32", ("B",)),
            TensorSpec(COMMIT_FLOOR, "int64", ("B",)),
            TensorSpec(TEMPERATURE, "float32", ("B",)),
            TensorSpec(NOISE, "float32", ("B", "S", candidate_count(config))),
            *(s.past for s in state_tensors(config, dtype)),
        ),
        (
            TensorSpec(NEXT_BLOCK, "int64", ("B", "S")),
            TensorSpec(PREDICTED, "int64", ("B", "S")),
            TensorSpec(CONFIDENCE, "float32", ("B", "S")),
            TensorSpec(MASKED_LEFT, "int64", ("B",)),
        ),
    )


def signatures(config: ModelConfig, dtype: str) -> dict[str, TowerSignature]:
    """All three graphs by name."""
    made = context_signature, head_signature, denoiser_signature
    return {s.name: s for s in (make(config, dtype) for make in made)}
