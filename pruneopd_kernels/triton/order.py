"""The order on logits as integers: descending logit, -0 equal to +0, NaN of either sign before everything."""

import torch
import triton
import triton.language as tl

# The bits of a float32 that are 0 in all that come from a narrower type, subnormals included.
KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}

NOTHING = tl.constexpr(-(2**31))  # comes after every logit; shifted like a key


@triton.jit
def order_of(x, SHIFT: tl.constexpr):
    """Greater comes first. SHIFT is the KEY_SHIFT of the type that x has or had."""
    x = x.to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key) >> SHIFT
