"""What is launched for a number of tokens: grids, parameters, and scratch memory.

Everything follows from the number of tokens. What the router chose is data in device memory, so
that a captured graph of these launches serves every routing, and nothing waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

from twotower.dtypes import DTYPES
from twotower.errors import RequestError
from twotower.kernels.cubin_manifest import Manifest, build_command
from twotower.kernels.shape import MATRICES, ExpertShape
from twotower.kernels.signatures import (
    COMBINE_COLUMNS,
    finds_pairs_at_once,
    kernel_specs,
    slot_tokens,
)
from twotower.kernels.tilings import Tier, tier_for, tiling

SCRATCH = "scratch+"
"""How a parameter in scratch memory begins; the offset in bytes follows."""

_ALIGNED = 256


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch.

    Attributes:
        params: Parameters in the kernel's order: the name of an array, `scratch+<offset>`, or a
            whole number. An array a format has not (a scale, say) is 0.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    params: tuple[str | int, ...]


def most_blocks(shape: ExpertShape, tokens: int, rows: int) -> int:
    """Most blocks of up to `rows` pairs of one expert that can be needed, whatever is chosen."""
    pairs = tokens * shape.top
    experts = min(pairs, shape.experts)
    return (pairs + experts * (min(rows, tokens) - 1)) // min(rows, tokens)


def scratch_bytes(shape: ExpertShape, tokens: int) -> int:
    """Bytes of scratch memory of the launches for a number of tokens; layers can share it."""
    return _places(shape, tokens)["end"]


def launches(shape: ExpertShape, tokens: int, sm: int, table: Manifest) -> tuple[Launch, ...]:
    """The launches of a layer, in order on one stream.

    Raises:
        RequestError: more tokens than the kernels take.
        EngineMismatchError: there are no kernels for this compute capability.
    """
    tier = tier_for(tokens)
    if tokens > table.max_tokens:
        raise RequestError(
            f"{tokens} tokens are more than the expert kernels were compiled for",
            found=f"{tokens} tokens; at most {table.max_tokens}",
            do=f"{build_command(table.folder, table.sms)} with a larger --max-batch, or fewer rows",
        )
    known: dict[str, str | int] = {
        "N": tokens,
        "BLOCKS": most_blocks(shape, tokens, tier.rows),
        "PROGRAMS": -(-tokens // slot_tokens(shape)),
    }
    for name, place in _places(shape, tokens).items():
        known[name] = f"{SCRATCH}{place}"
    known |= {name: name for name in ("x", "shares", "out", *weight_names(shape))}
    specs = {spec.name: spec for spec in kernel_specs(shape, sm)}
    out = []
    for name, grid in _grids(shape, tokens, tier, sm).items():
        cubin = table.cubin(name, sm)
        params = tuple(known.get(argument, 0) for argument, _ in specs[name].arguments)
        out.append(Launch(name, grid, cubin.threads, cubin.shared, params))
    return tuple(out)


def _grids(shape: ExpertShape, tokens: int, tier: Tier, sm: int) -> dict[str, tuple[int, int, int]]:
    """The grid of each kernel, in order of the launches."""
    columns = tiling(shape, tier, sm).columns
    blocks = most_blocks(shape, tokens, tier.rows) + shape.shared * -(-tokens // tier.rows)
    if finds_pairs_at_once(shape, tier):
        pairs = {f"pairs-{tier.name}": (shape.experts, 1, 1)}
    else:
        pairs = {
            f"slots-{tier.name}": (-(-tokens // slot_tokens(shape)), 1, 1),
            f"order-{tier.name}": (shape.experts, 1, 1),
        }
    return {
        **pairs,
        f"up-{tier.name}": (-(-shape.width // columns), blocks, 1),
        f"down-{tier.name}": (-(-shape.hidden // columns), blocks, 1),
        "combine": (tokens, -(-shape.hidden // COMBINE_COLUMNS), 1),
    }


def _places(shape: ExpertShape, tokens: int) -> dict[str, int]:
    """Offset of each intermediate array in scratch memory, and the end of the last."""
    tier = tier_for(tokens)
    pairs, element = tokens * shape.top, DTYPES[shape.dtype].bits // 8
    blocks = most_blocks(shape, tokens, tier.rows)
    hidden_elements = pairs * shape.width + tokens * shape.shared_intermediate
    sizes = {
        "order": 4 * pairs,
        "share_of": 4 * pairs,
        "blocks": 3 * 4 * blocks,
        "h": element * hidden_elements,
        "y": element * tokens * shape.slots * shape.hidden,
    }
    if not finds_pairs_at_once(shape, tier):
        sizes["slots"] = shape.experts * tokens
        sizes["counts"] = 4 * shape.experts * -(-tokens // slot_tokens(shape))
    out, end = {}, 0
    for name, size in sizes.items():
        out[name] = end
        end += -(-size // _ALIGNED) * _ALIGNED
    return {**out, "end": end}


def weight_names(shape: ExpertShape) -> tuple[str, ...]:
    """The weights launches name: each matrix, with its scales where its format has some."""
    out: list[str] = []
    for matrix in MATRICES:
        if matrix.startswith("shared") and not shape.shared_intermediate:
            continue
        how = shape.weights.of(matrix)
        out.append(matrix)
        if how is not None:
            out.append(f"{matrix}_scale")
            if how.scale_dtype == "float8e4m3fn":
                out.append(f"{matrix}_global_scale")
    return tuple(out)
