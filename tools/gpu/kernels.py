"""A small Triton kernel in the form that kernels of the runtime's own would have, and its cubins.

It multiplies blocks of 16 rows by weights that a list in device memory names: the grid is fixed,
which weights are read is data, so that a captured graph follows a list that changes. Compiling it
needs Triton and no GPU: `python -m tools.gpu.kernels FOLDER 90 80`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = [
    "COLUMNS",
    "DEPTH",
    "LIST_FILE",
    "ROWS",
    "STEP",
    "WIDTH",
    "chosen_product",
    "compile_cubins",
]

ROWS, COLUMNS, STEP = 16, 64, 128
"""Rows and columns of a block, and how many products it adds up in a step."""

WIDTH, DEPTH = 1856, 2688
"""Of the weights: an expert's first matrix in the published model."""

LIST_FILE = "kernels.json"
"""Beside the cubins: what a launch of each needs."""

_TYPES = {"x": "*bf16", "weights": "*bf16", "chosen": "*i32", "out": "*fp32"}
_CONSTANTS = {"WIDTH": WIDTH, "DEPTH": DEPTH, "ROWS": ROWS, "COLUMNS": COLUMNS, "STEP": STEP}
_OPTIONS = {"num_warps": 4, "num_stages": 4}


@triton.jit
def chosen_product(
    x,
    weights,
    chosen,
    out,
    WIDTH: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
):
    """out[b, r, n] = max(0, sum over k of x[b, r, k] * weights[chosen[b], n, k]) squared.

    x [blocks, ROWS, DEPTH] bf16 · weights [some, WIDTH, DEPTH] bf16 · chosen [blocks] i32 ·
    out [blocks, ROWS, WIDTH] f32; a grid of (WIDTH / COLUMNS, blocks).
    """
    block = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = block * ROWS + tl.arange(0, ROWS)
    steps = tl.arange(0, STEP)
    base = weights + tl.load(chosen + block).to(tl.int64) * (WIDTH * DEPTH)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, DEPTH, STEP):
        a = tl.load(x + rows[:, None] * DEPTH + k + steps[None, :])
        b = tl.load(base + columns[None, :] * DEPTH + k + steps[:, None])
        total = tl.dot(a, b, total)
    positive = tl.maximum(total, 0.0)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], positive * positive)


def compile_cubins(folder: Path, sms: Sequence[int]) -> list[dict[str, Any]]:
    """Writes a cubin for each compute capability, and the list of what a launch needs.

    Returns:
        The list: file, entry, threads, bytes of shared memory, types of the arguments, and how many
        null pointers follow them (scratch memory of Triton's that this kernel does not use).
    """
    folder.mkdir(parents=True, exist_ok=True)
    types = {name: _TYPES.get(name, "constexpr") for name in chosen_product.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if "*" in kind
    }
    rows = []
    for sm in sms:
        source = ASTSource(chosen_product, types, constexprs=_CONSTANTS, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=_OPTIONS)
        file = f"chosen_product_{sm}.cubin"
        (folder / file).write_bytes(made.asm["cubin"])
        head = made.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        rows.append(
            {
                "sm": sm,
                "file": file,
                "entry": made.metadata.name,
                "threads": 32 * made.metadata.num_warps,
                "shared": made.metadata.shared,
                "arguments": list(_TYPES.values()),
                "nulls": len(re.findall(r"\.param", head)) - len(_TYPES),
                "triton": triton.__version__,
            }
        )
    (folder / LIST_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    for row in compile_cubins(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]):
        print(json.dumps(row))
