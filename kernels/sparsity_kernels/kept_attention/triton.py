"""Flash attention among kept keys, forward and backward (README.md has the derivation).

This module launches; the kernels are in kernels.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsity_kernels.backend import device_of
from sparsity_kernels.kept_attention.kernels import (
    delta_kernel,
    forward_kernel,
    grad_key_kernel,
    grad_query_kernel,
)

# (bytes of a number, dim above 128): BLOCK_M, BLOCK_N and pipeline stages of each kernel. With 8 warps no kernel spills
# more than a few registers on Hopper, and two to three tiles are on their way while one is worked on.
_TILES = {
    (2, False): {"forward": (128, 64, 3), "grad_query": (128, 64, 3), "grad_key": (64, 128, 2)},
    (2, True): {"forward": (128, 32, 3), "grad_query": (64, 32, 3), "grad_key": (32, 32, 2)},
    (4, False): {"forward": (32, 16, 2), "grad_query": (32, 16, 2), "grad_key": (32, 32, 2)},
    (4, True): {"forward": (16, 16, 2), "grad_query": (16, 16, 2), "grad_key": (16, 16, 2)},
}
_LOG2E = 1.4426950408889634
_SCAN = 1024  # limits that a key tile looks at together
_DELTA_ROWS = 64


def kept_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, limits: Tensor, scale: float
) -> Tensor:
    """See `sparsity_kernels.kept_attention.kept_attention`, which checks the arguments. No host synchronisation.

    Memory outside the arguments is not touched whatever ``index`` and ``limits`` hold: the kernels clamp and mask.
    """
    return _KeptAttention.apply(query, key, value, index, limits, float(scale))


class _KeptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, index, limits, scale):
        output, lse = _forward(query, key, value, index, limits, scale)
        ctx.save_for_backward(query, key, value, index, limits, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None, None


def _forward(query, key, value, index, limits, scale) -> tuple[Tensor, Tensor]:
    """The output, laid out (batch, rows, heads, dim) in memory, and its (batch, kv_heads, flat rows) log2-sum-exp2."""
    batch, heads, rows, _ = query.shape
    kv_heads = key.shape[1]
    flat_rows = rows * heads // kv_heads
    output = _rows_first(query)
    lse = torch.empty(batch, kv_heads, flat_rows, dtype=torch.float32, device=query.device)
    tiles = _tiles("forward", query)
    grid = (triton.cdiv(flat_rows, tiles["BLOCK_M"]), batch * kv_heads)
    with device_of(query):
        forward_kernel[grid](
            *(query, key, value, index, limits, output, lse),
            *_strides(query, key, value, index, limits, output),
            scale * _LOG2E,
            *(kv_heads, flat_rows, index.shape[1], key.shape[2]),
            **_constants(query, kv_heads),
            **tiles,
        )
    return output, lse


def _backward(gradient, query, key, value, index, limits, output, lse, scale) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    kv_heads, keys = key.shape[1], index.shape[1]
    flat_rows = rows * heads // kv_heads
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    delta = torch.empty_like(lse)
    grad_query = _rows_first(query)
    grad_key = torch.zeros(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.zeros_like(grad_key)
    constants = _constants(query, kv_heads)
    sizes = (kv_heads, flat_rows)
    bounds = (keys, key.shape[2])
    with device_of(query):
        delta_kernel[(triton.cdiv(flat_rows, _DELTA_ROWS), batch * kv_heads)](
            *(gradient, output, delta),
            *_strides(gradient, output),
            *sizes,
            **constants,
            BLOCK_M=_DELTA_ROWS,
        )
        tiles = _tiles("grad_query", query)
        grad_query_kernel[(triton.cdiv(flat_rows, tiles["BLOCK_M"]), batch * kv_heads)](
            *(query, key, value, index, limits, gradient, lse, delta, grad_query),
            *_strides(query, key, value, index, limits, gradient, grad_query),
            *(scale, scale * _LOG2E),
            *sizes,
            *bounds,
            **constants,
            **tiles,
        )
        tiles = _tiles("grad_key", query)
        grad_key_kernel[(triton.cdiv(keys, tiles["BLOCK_N"]), batch * kv_heads)](
            *(query, key, value, index, limits, gradient, lse, delta, grad_key, grad_value),
            *_strides(query, key, value, index, limits, gradient, grad_key),
            *(scale, scale * _LOG2E),
            *(kv_heads, rows),
            *bounds,
            **constants,
            **tiles,
            SCAN=_SCAN,
        )
    return grad_query, grad_key, grad_value


def _rows_first(query: Tensor) -> Tensor:
    """An empty (batch, heads, rows, dim) tensor with the heads of a row side by side, as the next projection wants."""
    batch, heads, rows, dim = query.shape
    return torch.empty(batch, rows, heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of all tensors; without the last, which is 1, where there are four."""
    return [stride for tensor in tensors for stride in (tensor.stride()[:3] if tensor.ndim == 4 else tensor.stride())]


def _constants(query: Tensor, kv_heads: int) -> dict[str, int]:
    dim = query.shape[3]
    return {"GROUP": query.shape[1] // kv_heads, "DIM": dim, "BLOCK_D": triton.next_power_of_2(dim)}


def _tiles(kernel: str, query: Tensor) -> dict[str, int]:
    block_m, block_n, stages = _TILES[query.element_size(), query.shape[3] > 128][kernel]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8, "num_stages": stages}
