"""Activation memory of a tower: the tensors that must be alive at once, laid out in places."""

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

_WORKSPACES = (8_192_000, 2_048_000)
"""Bytes a product of the kernel library may use beside its tensors, as programs for every compute
capability reserve them."""

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Shapes:
    """What tensors depend on besides the model: `capacity` positions T and blocks of S tokens.

    `expanded`: a pass writes quantized experts to device memory at full width. `path` is an
    `expert_path.ExpertPath`. `arenas`: every program keeps memory of its own, as ONNX Runtime does.
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
    """Activation bytes of one graph: its largest profile's, as profiles share their memory.

    `because` has the two largest tensors of that profile.
    """

    nbytes: int
    because: str
    profiles: Mapping[str, int] = field(default_factory=dict)


_Tensors = Sequence[tuple[str, int]]
"""Tensors that are alive at the same time: what they are, and their bytes."""

_WORKSPACE = "workspace"
_PRODUCT: _Tensors = tuple((_WORKSPACE, size) for size in _WORKSPACES)


def scratch(graph: str, config: ModelConfig, shapes: Shapes) -> Scratch:
    """Activation memory of one graph, by profile.

    Layers run one after another and share memory: the largest tensor of every layer lies in one
    place, the second largest in another, and so on, each place as large as its largest tensor. The
    compiler of TensorRT for RTX lays them out so; at published widths the sum is within 10 % of
    what its programs reserve. Other libraries were not held against it.
    """
    programs = Counter(_programs(graph, config, shapes))
    sizes: dict[str, int] = {}
    largest: dict[_Program, Scratch] = {}
    for profile in profiles(graph, max_batch=shapes.max_batch, block_size=shapes.block_size):
        length = profile.axes["L"][2] if "L" in profile.axes else shapes.block_size
        made = {}
        for program in programs:
            made[program] = _laid_out(list(_Alive(program, config, shapes, length).moments()))
            known = largest.setdefault(program, made[program])
            if made[program].nbytes > known.nbytes:
                largest[program] = made[program]
        sizes[profile.name] = _together(made, programs, shapes)
    most = max(largest.values(), key=lambda s: s.nbytes)
    return Scratch(_together(largest, programs, shapes), most.because, sizes)


@dataclass(frozen=True, slots=True)
class _Program:
    """What is compiled in one piece: a graph (`whole`), or one of its programs between experts.

    `layers` leaves out experts that kernels compute; `last`: it ends with the head.
    """

    graph: str
    layers: tuple[LayerKind, ...]
    last: bool = True
    whole: bool = True


def _programs(graph: str, config: ModelConfig, shapes: Shapes) -> list[_Program]:
    """A tower in one piece, or each of the programs that kernels run between."""
    if shapes.path != KERNELS or graph == CONTEXT_HEAD:
        return [_Program(graph, config.layers)]
    layers: list[list[LayerKind]] = [[]]
    for kind in config.layers:
        if kind is LayerKind.MOE:
            layers.append([])
        else:
            layers[-1].append(kind)
    last = len(layers) - 1
    return [
        _Program(graph, tuple(kinds), last=number == last, whole=False)
        for number, kinds in enumerate(layers)
    ]


def _together(
    made: Mapping[_Program, Scratch], programs: Mapping[_Program, int], shapes: Shapes
) -> int:
    """Programs share memory, or each of them has an arena of its own."""
    if shapes.arenas:
        return sum(count * made[program].nbytes for program, count in programs.items())
    return max(s.nbytes for s in made.values())


def _laid_out(moments: Sequence[_Tensors]) -> Scratch:
    """Every place with the largest tensor of any moment that lies there."""
    ordered = [sorted(tensors, key=lambda t: -t[1]) for tensors in moments]
    lying = zip_longest(*ordered, fillvalue=("", 0))
    places = [max(tensors, key=lambda t: t[1]) for tensors in lying]
    names = [name for name, _ in places if name != _WORKSPACE][:2]
    return Scratch(sum(size for _, size in places), " and ".join(dict.fromkeys(names)))


@dataclass(frozen=True, slots=True)
class _Alive:
    """Tensors of a program over `length` tokens a row."""

    program: _Program
    config: ModelConfig
    shapes: Shapes
    length: int

    @property
    def rows(self) -> int:
        return self.shapes.max_batch

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return item_bytes(self.shapes.dtype)

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def moments(self) -> Iterator[_Tensors]:
        """What is alive at the fullest moment of every kind of layer."""
        config, graph, layers = self.config, self.program.graph, self.program.layers
        if graph == CONTEXT_HEAD:
            last = self.rows * config.vocab_size
            logits = ("logits [B,V]", last * self.item)
            yield [logits, *_PRODUCT]
            yield [logits, ("logits [B,V] in float32", last * _FLOAT32)]
            return
        always = self.always()
        yield always
        found: list[_Tensors] = []
        if LayerKind.MOE in layers:
            found.append(self.experts())
        if LayerKind.MLP in layers:
            hidden = ("MLP [B,L,F]", self.tokens * config.intermediate_size * self.item)
            found.append([hidden, hidden, *_PRODUCT])
        if LayerKind.MAMBA in layers:
            found += self.scan()
        if LayerKind.ATTENTION in layers:
            found += self.attention()
        if graph == DENOISER and self.program.last:
            count = self.tokens * config.vocab_size
            logits = ("logits [B,S,V] in float32", count * _FLOAT32)
            # In a program of its own the second tensor is the product's own, not yet widened.
            narrow = ("logits [B,S,V]", count * self.item)
            found.append([logits, logits if self.program.whole else narrow])
        for tensors in found:
            yield [*tensors, *always]

    def always(self) -> _Tensors:
        """Kept through all layers: the residual stream, and the mask or the modulation."""
        config, program = self.config, self.program
        stream = ("residual [B,L,D]", self.tokens * config.hidden_size * self.item)
        if program.graph == DENOISER:
            size = self.rows * 3 * config.hidden_size * self.item * len(program.layers)
            return [stream, stream, ("modulation [B,3,D] of every layer", size)]
        masked = LayerKind.ATTENTION in program.layers and self.length > 1
        if masked and self.shapes.dtype != "float32":
            heads = config.num_key_value_heads if splits_groups(config) else 1
            size = self.tokens * heads * self.shapes.capacity * self.item
            return [stream, ("mask [B,KV,L,T]", size)]
        return [stream]

    def experts(self) -> _Tensors:
        """Every expert computes every token, or every token's rows of the experts it chose.

        Of the chosen a branch has one expert at a time, which all tokens may have chosen; one
        operator has all.
        """
        config, path = self.config, self.shapes.path
        hidden, width = config.hidden_size, config.moe_intermediate_size
        copy = width * hidden * self.item
        if path in (CHOSEN, FUSED):
            pairs = self.tokens * config.num_experts_per_tok
            rows = pairs if path == FUSED else self.tokens
            pair = ("rows of pairs [B*L*K,D]", pairs * hidden * self.item)
            out = [
                pair,
                pair,
                ("hidden rows of pairs [B*L*K,F]", rows * width * self.item),
            ]
            expanded = ("one expanded expert [F,D]", copy)
        else:
            rows = config.n_routed_experts * self.tokens
            out = [
                ("experts [E,B*L,D]", rows * hidden * self.item),
                ("experts [E,B*L,F]", rows * width * self.item),
                _PRODUCT[0],
            ]
            expanded = ("expanded experts [E,F,D]", config.n_routed_experts * copy)
        if self.shapes.expanded:
            return [*out, expanded]
        return out

    def scan(self) -> Iterator[_Tensors]:
        """A chunk's masked decay of every pair of positions, twice; a single step has none."""
        config, heads = self.config, self.config.mamba_num_heads
        joined = config.mamba_inner + config.conv_channels + heads
        projection = ("projection [B,L,I]", self.tokens * joined * self.item)
        if self.length == 1:
            yield [projection, projection, *_PRODUCT]
            return
        state = config.ssm_state_size
        decay = ("decay [B,H,L,L]", self.tokens * heads * self.length * _FLOAT32)
        values = ("values [B,H,L,P]", self.tokens * config.mamba_inner * _FLOAT32)
        states = ("states [B,G,L,N]", self.tokens * config.n_groups * state * _FLOAT32)
        scan = (projection, values, values, values, states, _PRODUCT[0])
        yield [decay, decay, *scan]
        if self.program.graph == CONTEXT:
            size = self.rows * config.mamba_inner * state * _FLOAT32
            yield [decay, ("past state [B,H,P,N], transposed", size), *scan]

    def attention(self) -> Iterator[_Tensors]:
        """The denoiser writes its scores out, and so does the context tower in float32.

        There is no fused kernel for those. The fused kernel reads copies of keys and values: one of
        each where every head of keys is a row of its own or for a single position, else one for
        every query head.
        """
        config, capacity = self.config, self.shapes.capacity
        heads, groups, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        denoiser = self.program.graph == DENOISER
        queries = ("queries [B,H,L,d]", self.tokens * heads * size * self.item)
        yield [queries, *_PRODUCT]
        keys = ("keys [B,KV,T,d]", self.rows * groups * capacity * size * self.item)
        seen = capacity + (self.length if denoiser else 0)
        scores = ("scores [B,H,L,T] in float32", self.tokens * heads * seen * _FLOAT32)
        if denoiser:
            yield [scores, scores]
        elif self.shapes.dtype == "float32":
            yield [scores, scores, *_PRODUCT]
            yield [keys, *_PRODUCT]
        elif splits_groups(config):
            yield [keys, keys, queries, queries]
        elif self.length > 1:
            every = ("keys of every head [B,H,T,d]", keys[1] * (heads // groups))
            yield [every, every, queries, queries]
