"""The sizes and formats of a layer's experts, and whether kernels compute them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from twotower.bundle import ExpertsStep
from twotower.config.formats import FORMATS, GROUPS, WeightFormat
from twotower.errors import BuildError
from twotower.records import decode, encode

MOST_TOKENS = 4096
"""Tokens of a launch; longer chunks are several."""

MATRICES = ("up", "down", "shared_up", "shared_down")
"""The weights of a layer, by the names launches use."""

_GROUPS = (16, 32, 64, 128)
_MOST_EXPERTS, _MOST_TOP = 1024, 64
_FLOATS = ("bfloat16", "float16", "float32")
_OTHER_RECIPE = "quantize with another recipe"
_VALUES = ("int8", "float8e4m3fn", "int4", "float4e2m1")


@dataclass(frozen=True, slots=True)
class ExpertFormats:
    """How each matrix is stored; None is the model's own float type."""

    up: WeightFormat | None = None
    down: WeightFormat | None = None
    shared_up: WeightFormat | None = None
    shared_down: WeightFormat | None = None

    def of(self, matrix: str) -> WeightFormat | None:
        """The format of one of `MATRICES`."""
        found: WeightFormat | None = getattr(self, matrix)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Sizes and formats of one mixture-of-experts layer.

    The shared expert is computed as experts that everybody chooses: `shared` of them, each
    `shared_width` wide, which together are its width. The published 3712 is twice 1856.

    Attributes:
        hidden: Width of a token, D.
        width: Width of a routed expert, F.
        experts: Routed experts, E.
        top: Experts a token chooses, k.
        shared_intermediate: Width of the shared expert; 0 for none.
        dtype: `bfloat16`, `float16` or `float32`: of tokens, float weights and scales.

    Raises:
        BuildError: the kernels do not tile it; the error names the nearest that they do.
    """

    hidden: int
    width: int
    experts: int
    top: int
    shared_intermediate: int = 0
    dtype: str = "bfloat16"
    weights: ExpertFormats = field(default_factory=ExpertFormats)

    def __post_init__(self) -> None:
        if self.dtype not in _FLOATS:
            floats = ", ".join(_FLOATS)
            raise _refused("the type of the tokens", self.dtype, floats, do="export with --dtype")
        for name, value, most in (
            ("hidden size", self.hidden, 1 << 15),
            ("expert width", self.width, 1 << 15),
            ("number of experts", self.experts, _MOST_EXPERTS),
            ("number of experts a token chooses", self.top, min(_MOST_TOP, self.experts)),
        ):
            if not 1 <= value <= most:
                raise _refused(f"the {name}", value, f"the nearest is {max(1, min(value, most))}")
        for matrix in MATRICES:
            how = self.weights.of(matrix)
            if how is not None and (self.shared_intermediate or not matrix.startswith("shared")):
                self._check_format(matrix, how)

    def _check_format(self, matrix: str, how: WeightFormat) -> None:
        if how.dtype not in _VALUES:
            stored = f"stored as one of {', '.join(_VALUES)}"
            raise _refused(f"the format of {matrix}", how.label, stored, do=_OTHER_RECIPE)
        if how.group and how.group not in _GROUPS:
            nearest = min(_GROUPS, key=lambda group: abs(group - how.group))
            again = min(GROUPS, key=lambda group: abs(group - nearest))
            do = f"quantize with --group {again}"
            raise _refused(f"the group of {matrix}", how.label, f"the nearest is {nearest}", do=do)
        if how.scale_dtype not in (None, "float8e4m3fn", "float8e8m0"):
            raise _refused(
                f"the scales of {matrix}",
                how.scale_dtype,
                "float8e4m3fn and float8e8m0 besides the model's type",
                do=_OTHER_RECIPE,
            )
        columns = self.columns(matrix)
        if how.group and columns % how.group:
            fitting = [group for group in _GROUPS if columns % group == 0]
            nearest_text, do = "int8 or fp8 with a scale for each row", _OTHER_RECIPE
            if fitting:
                nearest_text = f"groups of {fitting[-1]}"
                do = f"quantize with --group {fitting[-1]}"
            found = f"{how.label} in rows of {columns}"
            raise _refused(f"the group of {matrix}", found, f"the nearest is {nearest_text}", do=do)
        if how.bits == 4 and not how.group:
            raise _refused(
                f"the format of {matrix}",
                f"{how.name} without groups",
                "groups of 16, 32, 64 or 128",
                do="quantize with --group 32, 64 or 128",
            )

    @property
    def shared(self) -> int:
        """Experts that everybody chooses."""
        return self.shared_intermediate // self.shared_width if self.shared_intermediate else 0

    @property
    def shared_width(self) -> int:
        """Width of each: the widest up to F that divides the whole and keeps groups whole."""
        total = self.shared_intermediate
        if not total:
            return self.width
        how = self.weights.shared_down
        unit = how.group if how is not None and how.group else 1
        widths = (
            total // parts
            for parts in range(max(1, math.ceil(total / self.width)), total + 1)
            if total % parts == 0
        )
        return next((width for width in widths if width % unit == 0), 1)

    def columns(self, matrix: str) -> int:
        """Length of the rows an expert multiplies: D for up, its width for down."""
        if matrix.endswith("up"):
            return self.hidden
        return self.shared_width if matrix == "shared_down" else self.width

    def stored_shape(self, matrix: str) -> tuple[int, ...]:
        """The shape of a matrix in a bundle."""
        e, f, d, total = self.experts, self.width, self.hidden, self.shared_intermediate
        return {
            "up": (e, f, d),
            "down": (e, d, f),
            "shared_up": (total, d),
            "shared_down": (d, total),
        }[matrix]

    @property
    def slots(self) -> int:
        """Rows of results a token takes: one for each expert it chose, and for each shared one."""
        return self.top + self.shared

    def to_json(self) -> Any:
        """Plain data."""
        return encode(self)

    @classmethod
    def from_json(cls, data: object) -> ExpertShape:
        """The shape from JSON data; RecordError if malformed, BuildError if not tiled."""
        return decode(cls, data)


def _refused(what: str, found: object, allowed: str, *, do: str = "") -> BuildError:
    dense = "build with --experts dense, or use `--target ort-cpu`"
    return BuildError(
        f"the expert kernels do not tile {what}: {found}",
        found=f"{found}; {allowed}",
        do=f"{do}, or {dense}" if do else dense,
    )


def shape_of(step: ExpertsStep) -> ExpertShape:
    """What a step's kernels are compiled for; BuildError if they do not tile it."""
    formats: dict[str, WeightFormat] = {}
    for matrix in MATRICES:
        if matrix in step.formats:
            name, group = step.formats[matrix]
            formats[matrix] = replace(FORMATS[name], group=group)
    return ExpertShape(
        hidden=step.hidden,
        width=step.width,
        experts=step.experts,
        top=step.top,
        shared_intermediate=step.shared_intermediate,
        dtype=step.dtype,
        weights=ExpertFormats(**formats),
    )
