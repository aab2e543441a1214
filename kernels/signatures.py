"""Which kernels a layer needs: arguments in order and constants, as data, without Triton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twotower.config.formats import WeightFormat
from twotower.errors import BuildError
from twotower.kernels.shape import ExpertShape
from twotower.kernels.tilings import BUILDABLE_SMS, TIERS, Tier, Tiling, tiling

COMBINE_COLUMNS = 512
"""Columns of a program of the last kernel."""

_ORDER_TOKENS = 256
"""Tokens a step of the second reads."""

_MOST_SHARES = 1 << 13
"""Shares one program reads at once to find the pairs: 16 a thread of 16 warps."""

_A_WARP = 1 << 9
"""Shares a warp of it takes: 16 a thread, or its registers would not do."""

_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
_STORED = {"int8": "*i8", "float8e4m3fn": "*u8", "int4": "*u8", "float4e2m1": "*u8"}
_FORMAT_CODES = {"int8": 1, "float8e4m3fn": 2, "int4": 3, "float4e2m1": 4}
_SCALE_CODES = {None: 2, "float8e4m3fn": 3, "float8e8m0": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel as it is compiled.

    Attributes:
        arguments: What a launch passes, in order: name and type as Triton spells it.
        tokens: The most tokens it is launched for.
        grid: How many programs, for a reader.
        stages: Depth of its pipeline of loads.
    """

    name: str
    function: str
    arguments: tuple[tuple[str, str], ...]
    constants: Mapping[str, int]
    warps: int
    tokens: int
    grid: str
    stages: int = 1

    @property
    def first(self) -> int:
        """The fewest tokens it is launched for."""
        if self.function == "combine":
            return 1
        return 1 + max((tier.tokens for tier in TIERS if tier.tokens < self.tokens), default=0)


def refuse_sm(shape: ExpertShape, sm: int) -> None:
    """Raises BuildError, with the reason, if a compute capability cannot have kernels."""
    if sm == 75:
        raise BuildError(
            "the expert kernels are not made for SM 75",
            found="SM 75: Triton does not use its matrix units, and none of them takes bfloat16",
            do="leave 75 out of --sm, or build with --experts dense",
        )
    if sm not in BUILDABLE_SMS:
        nearest = max((known for known in BUILDABLE_SMS if known <= sm), default=BUILDABLE_SMS[0])
        raise BuildError(
            f"the expert kernels are not made for SM {sm}",
            found=f"SM {sm}; made for SM {', '.join(map(str, BUILDABLE_SMS))}",
            do=f"the nearest is `--sm {nearest}`; or build with --experts dense",
        )


def kernel_specs(shape: ExpertShape, sm: int) -> tuple[KernelSpec, ...]:
    """A layer's kernels for a compute capability; BuildError if there can be none."""
    refuse_sm(shape, sm)
    specs: list[KernelSpec] = []
    for tier in TIERS:
        cut = tiling(shape, tier, sm)
        specs += _pairs(shape, tier)
        specs += [_product(shape, which, tier, cut) for which in ("up", "down")]
    own = _TYPES[shape.dtype]
    sizes = {"D": shape.hidden, "TOP": shape.top, "SHARED": shape.shared, "BD": COMBINE_COLUMNS}
    combine = KernelSpec(
        name="combine",
        function="combine",
        arguments=(("y", own), ("share_of", "*fp32"), ("out", own), ("N", "i32")),
        constants=sizes,
        warps=4,
        tokens=TIERS[-1].tokens,
        grid=f"tokens, hidden / {COMBINE_COLUMNS}",
    )
    return (*specs, combine)


def finds_pairs_at_once(shape: ExpertShape, tier: Tier) -> bool:
    """Whether one launch finds the pairs of a tier; otherwise there are two."""
    return _shares(shape, tier.tokens) <= _MOST_SHARES


def slot_tokens(shape: ExpertShape) -> int:
    """Tokens of a program of the first of two launches that find the pairs of many tokens."""
    return min(16, _MOST_SHARES // _experts_tile(shape))


def _experts_tile(shape: ExpertShape) -> int:
    return max(16, _power(shape.experts))


def _shares(shape: ExpertShape, tokens: int) -> int:
    """Shares in a tile of all experts and so many tokens."""
    return _experts_tile(shape) * max(16, _power(tokens))


def _pairs(shape: ExpertShape, tier: Tier) -> list[KernelSpec]:
    tile, one = _experts_tile(shape), slot_tokens(shape)
    sizes = {"E": shape.experts, "TOP": shape.top, "EP": tile}
    lists = (("order", "*i32"), ("share_of", "*fp32"), ("blocks", "*i32"))
    count, blocks = ("N", "i32"), ("BLOCKS", "i32")
    if finds_pairs_at_once(shape, tier):
        at_once = KernelSpec(
            name=f"pairs-{tier.name}",
            function="pairs_few",
            arguments=(("shares", "*fp32"), *lists, count, blocks),
            constants={**sizes, "BT": max(16, _power(tier.tokens)), "BM": tier.rows},
            warps=_warps(_shares(shape, tier.tokens)),
            tokens=tier.tokens,
            grid="experts",
        )
        return [at_once]
    between = (("slots", "*i8"), ("counts", "*i32"))
    first = KernelSpec(
        name=f"slots-{tier.name}",
        function="pairs_slots",
        arguments=(("shares", "*fp32"), *between, ("share_of", "*fp32"), count),
        constants={**sizes, "BT": one},
        warps=_warps(tile * one),
        tokens=tier.tokens,
        grid=f"tokens / {one}",
    )
    step = max(1, (_MOST_SHARES // 2) // tile)
    second = KernelSpec(
        name=f"order-{tier.name}",
        function="pairs_order",
        arguments=(
            *between,
            ("order", "*i32"),
            ("blocks", "*i32"),
            count,
            ("PROGRAMS", "i32"),
            blocks,
        ),
        constants={**sizes, "BP": step, "BT": _ORDER_TOKENS, "BM": tier.rows},
        warps=_warps(tile * step),
        tokens=tier.tokens,
        grid="experts",
    )
    return [first, second]


def _warps(shares: int) -> int:
    return min(16, max(4, shares // _A_WARP))


def _weights(shape: ExpertShape, which: str) -> tuple[tuple[str, str], ...]:
    """Arguments of the routed and the shared matrix: values, scales, the scale of the scales."""
    own = _TYPES[shape.dtype]
    out: list[tuple[str, str]] = []
    for matrix in (which, f"shared_{which}"):
        how = shape.weights.of(matrix)
        scales = own if how is None or how.scale_dtype is None else "*u8"
        out += [
            (matrix, own if how is None else _STORED[how.dtype]),
            (f"{matrix}_scale", scales),
            (f"{matrix}_global_scale", own),
        ]
    return tuple(out)


def _codes(how: WeightFormat | None, prefix: str = "") -> dict[str, int]:
    if how is None:
        return {f"{prefix}FORMAT": 0, f"{prefix}SCALE": 0, f"{prefix}GROUP": 0}
    scale = _SCALE_CODES[how.scale_dtype] if how.group else 1
    return {
        f"{prefix}FORMAT": _FORMAT_CODES[how.dtype],
        f"{prefix}SCALE": scale,
        f"{prefix}GROUP": how.group,
    }


def _product(shape: ExpertShape, which: str, tier: Tier, cut: Tiling) -> KernelSpec:
    """The kernel of the products `up` or `down`."""
    own = _TYPES[shape.dtype]
    order, blocks = ("order", "*i32"), ("blocks", "*i32")
    constants = {"D": shape.hidden, "F": shape.width, "SF": shape.shared_width, "TOP": shape.top}
    constants |= _codes(shape.weights.of(which))
    constants |= _codes(shape.weights.of(f"shared_{which}"), "S_")
    constants |= {"BM": cut.rows, "BN": cut.columns, "BK": cut.depth}
    if which == "up":
        read, written, width = "x", "h", "width"
        lists: tuple[tuple[str, str], ...] = (order, blocks)
    else:
        read, written, width = "h", "y", "hidden"
        lists = (order, ("share_of", "*fp32"), blocks)
        constants["SHARED"] = shape.shared
    weights, ends = _weights(shape, which), (("N", "i32"), ("BLOCKS", "i32"))
    return KernelSpec(
        name=f"{which}-{tier.name}",
        function=which,
        arguments=((read, own), *weights, *lists, (written, own), *ends),
        constants=constants,
        warps=cut.warps,
        stages=cut.stages,
        tokens=tier.tokens,
        grid=f"{width} / {cut.columns}, blocks",
    )


def _power(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()
