"""Which expert has which tokens: from shares [E,N] to pairs sorted by expert, without the host.

A pair is a token and one of its experts. The experts a token chose are numbered in ascending order
(the slot), so that a pair's number, token * TOP + slot, needs no other pair. A token has TOP slots
at most: what a row of NaN or infinity marks beyond them is dropped, and no memory but its own is
written.

`order` lists the pairs expert by expert, tokens ascending. `blocks` cuts the list: for each block
of at most BM pairs of one expert the expert, the first place and the place after the expert's last
pair, as three rows of BLOCKS entries. An expert of -1 marks a block that is not used.
"""

import triton
import triton.language as tl


@triton.jit
def _slots(share, TOP: tl.constexpr):
    """The slot of each expert of each token, [EP, BT], and whether it is a pair."""
    chosen = (share != 0.0).to(tl.int32)
    slot = tl.cumsum(chosen, 0) - chosen
    return slot, ((chosen != 0) & (slot < TOP)).to(tl.int32)


@triton.jit
def _write_blocks(blocks, counts, own, experts, e, BLOCKS, BM: tl.constexpr):
    """The blocks of expert `e`; the program of the first expert also marks those left over."""
    needed = (counts + BM - 1) // BM
    first = tl.sum(tl.where(experts < e, needed, 0), 0)
    start = tl.sum(tl.where(experts < e, counts, 0), 0)
    zeros = tl.zeros((16,), tl.int32)
    b = tl.arange(0, 16)
    for b0 in range(0, (own + BM - 1) // BM, 16):
        used = (b0 + b) * BM < own
        at = blocks + first + b0 + b
        tl.store(at, e + zeros, mask=used)
        tl.store(at + BLOCKS, start + (b0 + b) * BM, mask=used)
        tl.store(at + 2 * BLOCKS, start + own + zeros, mask=used)
    if e == 0:
        for b0 in range(tl.sum(needed, 0), BLOCKS, 16):
            tl.store(blocks + b0 + b, zeros - 1, mask=b0 + b < BLOCKS)
    return start


@triton.jit
def pairs_few(
    shares,
    order,
    share_of,
    blocks,
    N,
    BLOCKS,
    E: tl.constexpr,
    TOP: tl.constexpr,
    EP: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
):
    """All in one launch for at most BT tokens, one program an expert; each reads all shares."""
    e = tl.program_id(0)
    experts = tl.arange(0, EP)
    n = tl.arange(0, BT)
    mask = (experts[:, None] < E) & (n[None, :] < N)
    share = tl.load(shares + experts[:, None] * N + n[None, :], mask=mask, other=0.0)
    slot, pair = _slots(share, TOP)
    counts = tl.sum(pair, 1)
    own = tl.sum(tl.where(experts == e, counts, 0), 0)
    start = _write_blocks(blocks, counts, own, experts, e, BLOCKS, BM)
    mine = experts[:, None] == e
    is_pair = tl.sum(tl.where(mine, pair, 0), 0)
    number = n * TOP + tl.sum(tl.where(mine, slot, 0), 0)
    rank = tl.cumsum(is_pair, 0) - is_pair
    tl.store(order + start + rank, number, mask=is_pair != 0)
    own_share = tl.sum(tl.where(mine, share, 0.0), 0)
    tl.store(share_of + number, own_share, mask=is_pair != 0)
    if e == 0:
        used = tl.sum(pair, 0)
        for j in tl.static_range(TOP):
            tl.store(
                share_of + n * TOP + j, tl.zeros((BT,), tl.float32), mask=(n < N) & (j >= used)
            )


@triton.jit
def pairs_slots(
    shares,
    slots,
    counts,
    share_of,
    N,
    E: tl.constexpr,
    TOP: tl.constexpr,
    EP: tl.constexpr,
    BT: tl.constexpr,
):
    """First of two launches for many tokens, BT tokens a program.

    slots [E,N] int8, -1 where there is no pair; counts [programs,E] int32; share_of [N*TOP].
    """
    program = tl.program_id(0)
    experts = tl.arange(0, EP)
    n = program * BT + tl.arange(0, BT)
    mask = (experts[:, None] < E) & (n[None, :] < N)
    place = experts[:, None] * N + n[None, :]
    share = tl.load(shares + place, mask=mask, other=0.0)
    slot, pair = _slots(share, TOP)
    tl.store(slots + place, tl.where(pair != 0, slot, -1).to(tl.int8), mask=mask)
    tl.store(counts + program * E + experts, tl.sum(pair, 1), mask=experts < E)
    tl.store(share_of + n[None, :] * TOP + slot, share, mask=pair != 0)
    used = tl.sum(pair, 0)
    for j in tl.static_range(TOP):
        tl.store(share_of + n * TOP + j, tl.zeros((BT,), tl.float32), mask=(n < N) & (j >= used))


@triton.jit
def pairs_order(
    slots,
    counts,
    order,
    blocks,
    N,
    PROGRAMS,
    BLOCKS,
    E: tl.constexpr,
    TOP: tl.constexpr,
    EP: tl.constexpr,
    BP: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
):
    """Second of two launches, one program an expert; PROGRAMS is the grid of the first."""
    e = tl.program_id(0)
    experts = tl.arange(0, EP)
    total = tl.zeros((EP,), tl.int32)
    some = tl.arange(0, BP)
    for p in range(0, PROGRAMS, BP):
        mask = (p + some[:, None] < PROGRAMS) & (experts[None, :] < E)
        total += tl.sum(
            tl.load(counts + (p + some[:, None]) * E + experts[None, :], mask=mask, other=0), 0
        )
    own = tl.sum(tl.where(experts == e, total, 0), 0)
    at = _write_blocks(blocks, total, own, experts, e, BLOCKS, BM)
    for n0 in range(0, N, BT):
        n = n0 + tl.arange(0, BT)
        slot = tl.load(slots + e * N + n, mask=n < N, other=-1).to(tl.int32)
        is_pair = (slot >= 0).to(tl.int32)
        rank = tl.cumsum(is_pair, 0) - is_pair
        tl.store(order + at + rank, n * TOP + slot, mask=slot >= 0)
        at += tl.sum(is_pair, 0)
