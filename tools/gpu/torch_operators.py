"""The ONNX operators of the exported graphs on torch tensors, as the torch engine computes them.

Each takes the node's attributes and its inputs, and gives a tensor or several. Inputs named in
`HOST` decide shapes: they arrive as lists of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import onnx
import torch
import torch.nn.functional as functional

__all__ = ["HOST", "OPERATORS", "element_type"]

Attributes = dict[str, Any]
Tensor = torch.Tensor

HOST: dict[str, tuple[int, ...]] = {
    "Expand": (1,),
    "Range": (0, 1, 2),
    "ReduceLogSumExp": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}
"""Operator -> positions of the inputs that it needs as numbers."""

_TYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


def element_type(number: int) -> torch.dtype:
    """The torch type of an ONNX element type."""
    return _TYPES[onnx.TensorProto.DataType.Name(number)]


def _reshape(a: Attributes, x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])


def _unsqueeze(a: Attributes, x: Tensor, axes: Sequence[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(n % rank for n in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: Attributes, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    gone = [i for i, n in enumerate(x.shape) if n == 1] if axes is None else axes
    dropped = {n % x.dim() for n in gone}
    return x.reshape([n for i, n in enumerate(x.shape) if i not in dropped])


def _split(a: Attributes, x: Tensor, sizes: Sequence[int] | None = None) -> Sequence[Tensor]:
    axis = a.get("axis", 0)
    if sizes is None:
        return torch.split(x, -(-x.shape[axis] // a["num_outputs"]), axis)
    return torch.split(x, list(sizes), axis)


def _slice(
    a: Attributes,
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    if steps is not None and any(step != 1 for step in steps):
        raise NotImplementedError(f"Slice with steps {list(steps)}")
    for start, end, axis in zip(starts, ends, axes or range(len(starts)), strict=False):
        size = x.shape[axis]
        first, last = (max(0, n + size) if n < 0 else min(n, size) for n in (start, end))
        x = x.narrow(axis, first, max(0, last - first))
    return x


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def reduce(a: Attributes, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
        over = list(range(x.dim())) if axes is None else list(axes)
        return function(x, over, bool(a.get("keepdims", 1)))

    return reduce


def _top_k(a: Attributes, x: Tensor, k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Equal values keep their order, which torch.topk does not promise."""
    axis = a.get("axis", -1)
    values, indices = torch.sort(x, dim=axis, descending=bool(a.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, k[0]), indices.narrow(axis, 0, k[0])


def _tensor_scatter(
    a: Attributes, past: Tensor, update: Tensor, at: Tensor | None = None
) -> Tensor:
    axis = a.get("axis", -2) % past.dim()
    position = torch.arange(update.shape[axis], device=past.device)
    if at is None:
        at = torch.zeros(past.shape[0], dtype=torch.int64, device=past.device)
    shape = [1] * past.dim()
    shape[0], shape[axis] = past.shape[0], update.shape[axis]
    return past.scatter(axis, (at[:, None] + position).reshape(shape).expand(update.shape), update)


def _attention(
    a: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    if q.dim() != 4:
        raise NotImplementedError("attention without an axis of heads")
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = a.get("scale", 1 / math.sqrt(q.shape[-1]))
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    if mask is not None:
        if mask.shape[-1] < k.shape[2]:
            mask = functional.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=False)
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if boolean else scores + mask
    return torch.matmul(torch.softmax(scores, -1).to(v.dtype), v)


def _rms_norm(a: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    square = x.float().square().mean(-1, keepdim=True)
    return (x.float() * torch.rsqrt(square + a.get("epsilon", 1e-5))).to(x.dtype) * scale


def _gemm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    left, right = (x.T if a.get("transA") else x), (w.T if a.get("transB") else w)
    out = torch.matmul(left, right) * a.get("alpha", 1.0)
    return out if b is None else out + b * a.get("beta", 1.0)


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.dim()
    index = torch.where(index < 0, index + x.shape[axis], index)
    out = x.index_select(axis, index.reshape(-1))
    return out.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _gather_nd(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    leading, depth = a.get("batch_dims", 0), index.shape[-1]
    batch = math.prod(x.shape[:leading])
    values = x.reshape(batch, *x.shape[leading:])
    places = index.reshape(batch, -1, depth)
    rows = torch.arange(batch, device=x.device)[:, None]
    out = values[(rows, *places.unbind(-1))]
    return out.reshape(*index.shape[:-1], *x.shape[leading + depth :])


def _shape(a: Attributes, x: Tensor) -> Tensor:
    sizes = list(x.shape)[a.get("start", 0) : a.get("end", x.dim())]
    return torch.tensor(sizes, dtype=torch.int64)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operator of any number of inputs."""
    return lambda a, *some: reduce(function, some)


def _divide(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


_ONE = {
    "Cos": torch.cos,
    "Exp": torch.exp,
    "Identity": torch.clone,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
}
_TWO = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
}

OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: (lambda a, x, f=f: f(x)) for name, f in _ONE.items()},
    **{name: (lambda a, x, y, f=f: f(x, y)) for name, f in _TWO.items()},
    "ArgMax": lambda a, x: torch.argmax(x, a.get("axis", 0), bool(a.get("keepdims", 1))),
    "Attention": _attention,
    "Cast": lambda a, x: x.to(element_type(a["to"])),
    "Concat": lambda a, *some: torch.cat(some, a["axis"]),
    "Div": _divide,
    "Expand": lambda a, x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape))),
    "Gather": _gather,
    "GatherElements": lambda a, x, index: x.gather(a.get("axis", 0), index),
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": lambda a, x, y: torch.matmul(x, y),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "RMSNormalization": _rms_norm,
    "Range": lambda a, start, end, step: torch.arange(start[0], end[0], step[0]),
    "ReduceLogSumExp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)),
    "Softplus": lambda a, x: functional.softplus(x, threshold=50),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _folded(torch.add),
    "TensorScatter": _tensor_scatter,
    "Tile": lambda a, x, times: x.repeat(*times),
    "TopK": _top_k,
    "Transpose": lambda a, x: x.permute(a.get("perm", list(range(x.dim()))[::-1])),
    "Unsqueeze": _unsqueeze,
    "Where": lambda a, condition, x, y: torch.where(condition, x, y),
}
"""Operator -> function."""
