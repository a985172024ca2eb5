"""The product of two tiles, for the Triton kernels of several operations."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsity_kernels.backend import interpreted

_WIDEN = tl.constexpr(interpreted())  # Triton's interpreter multiplies the bits of bfloat16, so it gets them as float32


@triton.jit
def dot(b_left, b_right, b_sum):
    """b_sum + b_left b_right, the sum in float32 and float32 factors in full precision."""
    if _WIDEN:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee")
