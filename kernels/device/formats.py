"""Stored weights as numbers: every format decoded in registers, by what any GPU has.

8-bit and 4-bit floats are moved into the bits of a float16, whose exponent has a wider range, and
are multiplied by the power of two between the two biases: exact, subnormal numbers included. 4-bit
integers are moved into the fraction of 2^23, from which 2^23 is taken away again: exact as well,
and free of the conversion instructions, which are slow.
"""

import triton
import triton.language as tl

_FLOAT: tl.constexpr = tl.constexpr(0)
_INT8: tl.constexpr = tl.constexpr(1)
_FLOAT8: tl.constexpr = tl.constexpr(2)
_INT4: tl.constexpr = tl.constexpr(3)

_NO_SCALE: tl.constexpr = tl.constexpr(0)
_ROW_SCALE: tl.constexpr = tl.constexpr(1)
_GROUP_SCALE: tl.constexpr = tl.constexpr(2)
_FLOAT8_SCALE: tl.constexpr = tl.constexpr(3)


_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Float32 values in DTYPE, to nearest even; Triton's interpreter would cut bfloat16 off."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def _float8(byte):
    """The numbers of E4M3 bytes, float32. The byte 0x7F (NaN) is not a weight and gives 480."""
    b = byte.to(tl.int32)
    bits = ((b & 0x80) << 8) | ((b & 0x7F) << 7)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _float4(code):
    """The numbers of E2M1 codes 0..15 (int32), float32."""
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _int4(code):
    """The numbers of two's complement codes 0..15 (int32), float32."""
    bits = (code ^ 8) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def whole_bytes(stored, FORMAT: tl.constexpr):
    """Weights of a byte or more as they are multiplied: floats as they are, others float32."""
    if FORMAT == _FLOAT:
        return stored
    elif FORMAT == _INT8:
        return stored.to(tl.float32)
    else:
        return _float8(stored)


@triton.jit
def halves(stored, FORMAT: tl.constexpr):
    """The two numbers of each byte, float32: the first lies in the low half."""
    low = stored.to(tl.int32) & 15
    high = stored.to(tl.int32) >> 4
    if FORMAT == _INT4:
        return _int4(low), _int4(high)
    else:
        return _float4(low), _float4(high)


@triton.jit
def group_scales(
    scales,
    whole,
    n,
    inside,
    k0,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Scales of the rows `n` for weights k0 .. k0+BK, float32: [BN, groups], or 0 for none here.

    A scale for each row is no matter of a step: it multiplies the sum.
    """
    if SCALE <= _ROW_SCALE:
        return 0.0
    else:
        UNITS: tl.constexpr = BK // GROUP if GROUP < BK else 1
        g = k0 // GROUP + tl.arange(0, UNITS)
        mask = inside[:, None] & (g[None, :] * GROUP < K)
        stored = tl.load(scales + n[:, None] * (STRIDE // GROUP) + g[None, :], mask=mask, other=0)
        if SCALE == _GROUP_SCALE:
            return stored.to(tl.float32)
        elif SCALE == _FLOAT8_SCALE:
            product = _float8(stored) * tl.load(whole).to(tl.float32)
            return rounded(product, DTYPE).to(tl.float32)
        else:  # a power of two by its exponent
            return (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(
    values,
    scales,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    W: tl.constexpr,
    UNITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Values [BN, W] times the scales [BN, UNITS] of their groups, rounded to DTYPE."""
    if SCALE <= _ROW_SCALE:
        return values.to(DTYPE)
    elif UNITS == 1:
        return rounded(values * scales, DTYPE)
    else:
        cut = tl.reshape(values, (BN, UNITS, W // UNITS)) * scales[:, :, None]
        return rounded(tl.reshape(cut, (BN, W)), DTYPE)
