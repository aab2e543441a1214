"""Products of chosen experts: up with squared ReLU, down with shares, sums of rows.

Weights are the first operand of a product and the rows of tokens the second: weights are the large
side of the matrix instruction however few tokens there are, and decoded weights stay in registers.
A result is one chain of sums over K in steps of BK, whatever rows lie beside it and however many.
"""

import triton
import triton.language as tl

from twotower.kernels.device.formats import group_scales, halves, rounded, scaled, whole_bytes

_FLOAT8: tl.constexpr = tl.constexpr(2)
_ROW_SCALE: tl.constexpr = tl.constexpr(1)
_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _dot(weights, rows, acc):
    """Acc + weights @ rows in float32; Triton's interpreter multiplies no bfloat16."""
    if _INTERPRETED:
        return tl.dot(weights.to(tl.float32), rows.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(weights, rows, acc, input_precision="ieee")


@triton.jit
def _rows(a, row, live, k0, K: tl.constexpr, BK: tl.constexpr):
    """Rows `row` of a [.., K] at columns k0 .. k0+BK, as [BK, BM]; zeros where not `live`."""
    k = k0 + tl.arange(0, BK)
    mask = live[None, :] if K % BK == 0 else live[None, :] & (k[:, None] < K)
    return tl.load(a + row[None, :] * K + k[:, None], mask=mask, other=0.0)


@triton.jit
def _even_odd(a, row, live, k0, K: tl.constexpr, BK: tl.constexpr):
    """The same, the even and the odd columns apart, each [BK/2, BM]: as the halves of bytes lie."""
    j = k0 // 2 + tl.arange(0, BK // 2)
    mask = live[None, :] if K % BK == 0 else live[None, :] & (j[:, None] < K // 2)
    DTYPE: tl.constexpr = a.dtype.element_ty
    if DTYPE.primitive_bitwidth == 16:  # read as words of two, which keeps the reads wide
        words = a.to(tl.pointer_type(tl.uint32), bitcast=True)
        word = tl.load(words + row[None, :] * (K // 2) + j[:, None], mask=mask, other=0)
        even = (word & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        return even, (word >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        at = a + row[None, :] * K + 2 * j[:, None]
        return tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)


@triton.jit
def _product(
    a,
    row,
    live,
    w,
    scales,
    whole,
    n,
    OUT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """[BN, BM] float32: rows `n` of w [OUT, STRIDE], columns 0..K, times rows of a [.., K].

    `w` and `scales` point to the first row; STRIDE is in weights, whatever a weight takes.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    UNITS: tl.constexpr = BK // GROUP if GROUP > 0 and GROUP < BK else 1
    inside = n < OUT
    acc = tl.zeros((BN, BM), tl.float32)
    for k0 in range(0, K, BK):
        factors = group_scales(scales, whole, n, inside, k0, K, STRIDE, SCALE, GROUP, BK, DTYPE)
        if FORMAT <= _FLOAT8:
            k = k0 + tl.arange(0, BK)
            mask = inside[:, None] if K % BK == 0 else inside[:, None] & (k[None, :] < K)
            stored = tl.load(w + n[:, None] * STRIDE + k[None, :], mask=mask, other=0)
            values = scaled(whole_bytes(stored, FORMAT), factors, SCALE, BN, BK, UNITS, DTYPE)
            acc = _dot(values, _rows(a, row, live, k0, K, BK), acc)
        else:
            j = k0 // 2 + tl.arange(0, BK // 2)
            mask = inside[:, None] if K % BK == 0 else inside[:, None] & (j[None, :] < K // 2)
            stored = tl.load(w + n[:, None] * (STRIDE // 2) + j[None, :], mask=mask, other=0)
            low, high = halves(stored, FORMAT)
            even, odd = _even_odd(a, row, live, k0, K, BK)
            acc = _dot(scaled(low, factors, SCALE, BN, BK // 2, UNITS, DTYPE), even, acc)
            acc = _dot(scaled(high, factors, SCALE, BN, BK // 2, UNITS, DTYPE), odd, acc)
    if SCALE == _ROW_SCALE:
        acc *= tl.load(scales + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def _matrix(w, expert, SIZE: tl.constexpr, FORMAT: tl.constexpr):
    """Where an expert's weights begin, of SIZE each."""
    if FORMAT > _FLOAT8:
        return w + expert * (SIZE // 2)
    else:
        return w + expert * SIZE


@triton.jit
def _scales(scales, expert, ROWS: tl.constexpr, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """Where an expert's scales begin: one a row of its ROWS, or one a group of its weights."""
    if GROUP == 0:
        return scales + expert * ROWS
    else:
        return scales + expert * (SIZE // GROUP)


@triton.jit
def _pairs(order, blocks, block, BLOCKS, BM: tl.constexpr):
    """The pairs of a block, and which of the BM there are."""
    m = tl.load(blocks + BLOCKS + block) + tl.arange(0, BM)
    live = m < tl.load(blocks + 2 * BLOCKS + block)
    return tl.load(order + m, mask=live, other=0).to(tl.int64), live


@triton.jit
def _tokens(block, N, BM: tl.constexpr):
    """Of a block beyond those of pairs: its shared expert, its tokens, and which there are."""
    tiles = (N + BM - 1) // BM
    token = (block % tiles * BM + tl.arange(0, BM)).to(tl.int64)
    return (block // tiles).to(tl.int64), token, token < N


@triton.jit
def _store(out, row, live, n, values, OUT: tl.constexpr):
    """Values [BN, BM] into rows `row` and columns `n` of out [.., OUT], rounded to its type."""
    mask = live[None, :] & (n[:, None] < OUT)
    tl.store(
        out + row[None, :] * OUT + n[:, None], rounded(values, out.dtype.element_ty), mask=mask
    )


@triton.jit
def _squared_relu(values):
    positive = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive


@triton.jit
def up(
    x,
    w,
    w_scale,
    w_whole,
    sw,
    sw_scale,
    sw_whole,
    order,
    blocks,
    h,
    N,
    BLOCKS,
    D: tl.constexpr,
    F: tl.constexpr,
    SF: tl.constexpr,
    TOP: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    S_FORMAT: tl.constexpr,
    S_SCALE: tl.constexpr,
    S_GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """h[pair] = relu(w[expert] @ x[token])^2; after the N*TOP pairs, N rows for each shared expert.

    Grid: F / BN, BLOCKS + S * ceil(N / BM). w [E,F,D], sw [S*SF,D], h [N*TOP,F] and then [S*N,SF];
    SF is at most F.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    if block < BLOCKS:
        expert = tl.load(blocks + block).to(tl.int64)
        if expert >= 0:
            pair, live = _pairs(order, blocks, block, BLOCKS, BM)
            own = _matrix(w, expert, F * D, FORMAT)
            factors = _scales(w_scale, expert, F, F * D, GROUP)
            acc = _product(
                x, pair // TOP, live, own, factors, w_whole, n,
                F, D, D, FORMAT, SCALE, GROUP, BM, BN, BK,
            )  # fmt: skip
            _store(h, pair, live, n, _squared_relu(acc), F)
    elif tl.program_id(0) * BN < SF:
        s, token, live = _tokens(block - BLOCKS, N, BM)
        own = _matrix(sw, s, SF * D, S_FORMAT)
        factors = _scales(sw_scale, s, SF, SF * D, S_GROUP)
        acc = _product(
            x, token, live, own, factors, sw_whole, n,
            SF, D, D, S_FORMAT, S_SCALE, S_GROUP, BM, BN, BK,
        )  # fmt: skip
        _store(h + (N * TOP).to(tl.int64) * F, s * N + token, live, n, _squared_relu(acc), SF)


@triton.jit
def down(
    h,
    w,
    w_scale,
    w_whole,
    sw,
    sw_scale,
    sw_whole,
    order,
    share_of,
    blocks,
    y,
    N,
    BLOCKS,
    D: tl.constexpr,
    F: tl.constexpr,
    SF: tl.constexpr,
    TOP: tl.constexpr,
    SHARED: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    S_FORMAT: tl.constexpr,
    S_SCALE: tl.constexpr,
    S_GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y[pair] = share * (w[expert] @ h[pair]); rows of the shared experts have share 1.

    Grid: D / BN, BLOCKS + S * ceil(N / BM). w [E,D,F], sw [D,S*SF], y [N*TOP + S*N, D].
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    block = tl.program_id(1)
    if block < BLOCKS:
        expert = tl.load(blocks + block).to(tl.int64)
        if expert >= 0:
            pair, live = _pairs(order, blocks, block, BLOCKS, BM)
            own = _matrix(w, expert, D * F, FORMAT)
            factors = _scales(w_scale, expert, D, D * F, GROUP)
            acc = _product(
                h, pair, live, own, factors, w_whole, n,
                D, F, F, FORMAT, SCALE, GROUP, BM, BN, BK,
            )  # fmt: skip
            share = tl.load(share_of + pair, mask=live, other=0.0)
            _store(y, pair, live, n, acc * share[None, :], D)
    else:  # a shared expert is some columns of the rows of one matrix
        s, token, live = _tokens(block - BLOCKS, N, BM)
        row = s * N + token
        own = _matrix(sw, s, SF, S_FORMAT)
        factors = _scales(sw_scale, s, 0, SF, S_GROUP)
        acc = _product(
            h + (N * TOP).to(tl.int64) * F, row, live, own, factors, sw_whole, n,
            D, SF, SHARED * SF, S_FORMAT, S_SCALE, S_GROUP, BM, BN, BK,
        )  # fmt: skip
        _store(y, N * TOP + row, live, n, acc, D)


@triton.jit
def combine(
    y,
    share_of,
    out,
    N,
    D: tl.constexpr,
    TOP: tl.constexpr,
    SHARED: tl.constexpr,
    BD: tl.constexpr,
):
    """out[token]: its rows of y added in float32, slots ascending and shared experts last.

    Grid: N, D / BD. The row of a slot that is not used was not written and is not read.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), tl.float32)
    for j in tl.static_range(TOP):
        used = tl.load(share_of + token * TOP + j + 0 * d) != 0.0
        total += tl.load(y + (token * TOP + j) * D + d, mask=used & (d < D), other=0.0).to(
            tl.float32
        )
    for s in tl.static_range(SHARED):
        row = N * TOP + s * N + token
        total += tl.load(y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + d, rounded(total, out.dtype.element_ty), mask=d < D)
