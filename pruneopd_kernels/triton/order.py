"""Order logits as integers: descending logit, -0 equal to +0, NaN of either sign before everything."""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**31))  # comes after every logit; shifted like a key


@triton.constexpr_function
def key_shift(dtype):
    """Return how many low bits are 0 in every float32 that comes from the dtype, subnormals included."""
    return {tl.float32: 0, tl.float16: 13, tl.bfloat16: 16}[dtype]


@triton.jit
def order_of(x, SHIFT: tl.constexpr):
    """Return keys of which the greater comes first. SHIFT is the key_shift of the dtype that x has or had."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key) >> SHIFT
