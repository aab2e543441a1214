"""Activation memory of a tower: what must be alive at once, held against what compiled programs of TensorRT for RTX reserve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from twotower.builders.base import DENSE, FUSED, KERNELS
from twotower.builders.profiles import profiles
from twotower.config.model import LayerKind, ModelConfig
from twotower.dtypes import item_bytes
from twotower.planning.expert_path import CHOSEN
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, splits_groups

__all__ = ["Scratch", "Shapes", "scratch"]

_WORKSPACES = (8_192_000, 2_048_000)
"""Bytes a product of the kernel library may use beside its tensors, as programs for every compute capability reserve them."""

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Shapes:
    """What tensors depend on besides the model.

    Attributes:
        dtype: Element type of the graphs.
        max_batch: Most rows.
        capacity: Positions T of the cache.
        block_size: Tokens S of a block.
        expanded: Whether a pass writes quantized experts to device memory at full width.
        path: What computes the experts; see `expert_path.ExpertPath`.
        arenas: Whether every program keeps memory of its own: a session of ONNX Runtime does.
    """

    dtype: str
    max_batch: int
    capacity: int
    block_size: int
    expanded: bool = False
    path: str = DENSE
    arenas: bool = False


@dataclass(frozen=True, slots=True)
class Scratch:
    """Activation memory of one graph.

    Attributes:
        nbytes: Of its most demanding profile; profiles share their memory.
        because: The two largest tensors of that profile.
        profiles: Bytes of every profile.
    """

    nbytes: int
    because: str
    profiles: Mapping[str, int] = field(default_factory=dict)


_Tensors = Sequence[tuple[str, int]]
"""Tensors that are alive at the same time: what they are, and their bytes."""


def scratch(graph: str, config: ModelConfig, shapes: Shapes) -> Scratch:
    """Activation memory of one graph, by profile.

    Layers run one after another and share memory: the largest tensor of every layer lies in one
    place, the second largest in another, and so on. A place is as large as the largest that ever
    lies there. This is how the compiler of TensorRT for RTX lays them out; at published widths the
    sum is within 10 % of what its programs reserve. Other libraries were not held against it.
    """
    found, parts = {}, Counter(_parts(graph, config, shapes))
    for profile in profiles(graph, max_batch=shapes.max_batch, block_size=shapes.block_size):
        length = profile.axes["L"][2] if "L" in profile.axes else shapes.block_size
        found[profile.name] = {
            part: _laid_out(list(_moments(part, config, shapes, length))) for part in parts
        }
    each = {
        part: max((made[part] for made in found.values()), key=lambda s: s.nbytes) for part in parts
    }
    most = max(each.values(), key=lambda s: s.nbytes)
    if not shapes.arenas:
        largest = {name: max(s.nbytes for s in made.values()) for name, made in found.items()}
        return Scratch(most.nbytes, most.because, largest)
    sums = {
        name: sum(count * made[part].nbytes for part, count in parts.items())
        for name, made in found.items()
    }
    return Scratch(
        sum(count * each[part].nbytes for part, count in parts.items()), most.because, sums
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """What is compiled in one piece: a graph, or one of its programs between experts.

    Attributes:
        graph: Of which graph.
        layers: Its layers, but for experts that kernels compute.
        last: Whether it ends with the head.
        whole: Whether it is all of the graph.
    """

    graph: str
    layers: tuple[LayerKind, ...]
    last: bool = True
    whole: bool = True


def _parts(graph: str, config: ModelConfig, shapes: Shapes) -> Iterator[_Part]:
    """A tower in one piece, or each of the programs that kernels run between."""
    if shapes.path != KERNELS or graph == CONTEXT_HEAD:
        yield _Part(graph, config.layers)
        return
    programs: list[list[LayerKind]] = [[]]
    for kind in config.layers:
        if kind is LayerKind.MOE:
            programs.append([])
        else:
            programs[-1].append(kind)
    for program in programs:
        yield _Part(graph, tuple(program), last=program is programs[-1], whole=False)


def _laid_out(moments: Sequence[_Tensors]) -> Scratch:
    """Every place with the largest tensor of any moment that lies there."""
    ordered = [sorted(tensors, key=lambda t: -t[1]) for tensors in moments]
    places = [
        max(tensors, key=lambda t: t[1]) for tensors in zip_longest(*ordered, fillvalue=("", 0))
    ]
    names = [name for name, _ in places if name != _WORKSPACE][:2]
    return Scratch(sum(size for _, size in places), " and ".join(dict.fromkeys(names)))


_WORKSPACE = "workspace"
_PRODUCT: _Tensors = tuple((_WORKSPACE, size) for size in _WORKSPACES)


def _moments(part: _Part, config: ModelConfig, shapes: Shapes, length: int) -> Iterator[_Tensors]:
    """What is alive at the fullest moment of every kind of layer."""
    rows, item, graph = shapes.max_batch, item_bytes(shapes.dtype), part.graph
    if graph == CONTEXT_HEAD:
        last = rows * config.vocab_size
        yield [("logits [B,V]", last * item), *_PRODUCT]
        yield [("logits [B,V]", last * item), ("logits [B,V] in float32", last * _FLOAT32)]
        return
    always = list(_always(part, config, shapes, length))
    yield always
    if LayerKind.MOE in part.layers:
        experts = _chosen_experts if shapes.path in (CHOSEN, FUSED) else _experts
        yield [*experts(config, shapes, length), *always]
    if LayerKind.MLP in part.layers:
        hidden = ("MLP [B,L,F]", rows * length * config.intermediate_size * item)
        yield [hidden, hidden, *_PRODUCT, *always]
    if LayerKind.MAMBA in part.layers:
        yield from ([*tensors, *always] for tensors in _scan(graph, config, shapes, length))
    if LayerKind.ATTENTION in part.layers:
        yield from ([*tensors, *always] for tensors in _attention(graph, config, shapes, length))
    if graph == DENOISER and part.last:
        logits = ("logits [B,S,V] in float32", rows * length * config.vocab_size * _FLOAT32)
        # In a program of its own the second tensor is the product's own, not yet widened.
        narrow = ("logits [B,S,V]", rows * length * config.vocab_size * item)
        yield [logits, logits if part.whole else narrow, *always]


def _always(part: _Part, config: ModelConfig, shapes: Shapes, length: int) -> _Tensors:
    """From the first layer to the last: the residual stream, and the mask or the modulation of all layers."""
    rows, item = shapes.max_batch, item_bytes(shapes.dtype)
    stream = ("residual [B,L,D]", rows * length * config.hidden_size * item)
    if part.graph == DENOISER:
        modulation = (
            "modulation [B,3,D] of every layer",
            rows * 3 * config.hidden_size * item * len(part.layers),
        )
        return stream, stream, modulation
    if LayerKind.ATTENTION in part.layers and shapes.dtype != "float32" and length > 1:
        heads = config.num_key_value_heads if splits_groups(config) else 1
        return stream, ("mask [B,KV,L,T]", rows * heads * length * shapes.capacity * item)
    return (stream,)


def _experts(config: ModelConfig, shapes: Shapes, length: int) -> _Tensors:
    """Every expert computes every token."""
    item = item_bytes(shapes.dtype)
    tokens = config.n_routed_experts * shapes.max_batch * length
    copy = config.n_routed_experts * config.moe_intermediate_size * config.hidden_size * item
    return [
        ("experts [E,B*L,D]", tokens * config.hidden_size * item),
        ("experts [E,B*L,F]", tokens * config.moe_intermediate_size * item),
        *([("expanded experts [E,F,D]", copy)] if shapes.expanded else []),
        _PRODUCT[0],
    ]


def _chosen_experts(config: ModelConfig, shapes: Shapes, length: int) -> _Tensors:
    """Every token's row once for each expert it chose, the results, and what is between.

    A branch has one expert at a time, which all tokens may have chosen; one operator has all.
    """
    item, tokens = item_bytes(shapes.dtype), shapes.max_batch * length
    pairs = (
        "rows of pairs [B*L*K,D]",
        tokens * config.num_experts_per_tok * config.hidden_size * item,
    )
    copy = config.moe_intermediate_size * config.hidden_size * item
    rows = tokens * (config.num_experts_per_tok if shapes.path == FUSED else 1)
    return [
        pairs,
        pairs,
        ("hidden rows of pairs [B*L*K,F]", rows * config.moe_intermediate_size * item),
        *([("one expanded expert [F,D]", copy)] if shapes.expanded else []),
    ]


def _scan(graph: str, config: ModelConfig, shapes: Shapes, length: int) -> Iterator[_Tensors]:
    """A chunk at a time: the masked decay of every pair of positions, twice; a single step has none."""
    rows, heads = shapes.max_batch, config.mamba_num_heads
    joined = config.mamba_inner + config.conv_channels + heads
    projection = ("projection [B,L,I]", rows * length * joined * item_bytes(shapes.dtype))
    if length == 1:
        yield [projection, projection, *_PRODUCT]
        return
    decay = ("decay [B,H,L,L]", rows * heads * length * length * _FLOAT32)
    values = ("values [B,H,L,P]", rows * heads * length * config.mamba_head_dim * _FLOAT32)
    states = (
        "states [B,G,L,N]",
        rows * config.n_groups * length * config.ssm_state_size * _FLOAT32,
    )
    scan = (projection, values, values, values, states, _PRODUCT[0])
    yield [decay, decay, *scan]
    if graph == CONTEXT:
        size = rows * heads * config.mamba_head_dim * config.ssm_state_size * _FLOAT32
        yield [decay, ("past state [B,H,P,N], transposed", size), *scan]


def _attention(graph: str, config: ModelConfig, shapes: Shapes, length: int) -> Iterator[_Tensors]:
    """The denoiser writes its scores out, and so does the context tower in float32, where there is no fused kernel.

    The fused kernel reads keys and values from a copy, one of each where every head of keys is a
    row of its own, and otherwise, but for a single position, one for every query head.
    """
    rows, item = shapes.max_batch, item_bytes(shapes.dtype)
    queries = (
        "queries [B,H,L,d]",
        rows * config.num_attention_heads * length * config.head_dim * item,
    )
    yield [queries, *_PRODUCT]
    keys = (
        "keys [B,KV,T,d]",
        rows * config.num_key_value_heads * shapes.capacity * config.head_dim * item,
    )
    seen = shapes.capacity + (length if graph == DENOISER else 0)
    scores = (
        "scores [B,H,L,T] in float32",
        rows * config.num_attention_heads * length * seen * _FLOAT32,
    )
    if graph == DENOISER:
        yield [scores, scores]
    elif shapes.dtype == "float32":
        yield [scores, scores, *_PRODUCT]
        yield [keys, *_PRODUCT]
    elif splits_groups(config):
        yield [keys, keys, queries, queries]
    elif length > 1:
        times = config.num_attention_heads // config.num_key_value_heads
        every = ("keys of every head [B,H,T,d]", keys[1] * times)
        yield [every, every, queries, queries]
