"""Attention for prefill and training: among kept keys by index, and plain causal. README.md has the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_kernels.backend import TRITON_DTYPES, Impl, runs_triton
from sparsity_kernels.checks import check_attention_tensors, check_head_dim
from sparsity_kernels.kept_attention.eager import (
    causal_attention_eager,
    check_limits,
    kept_attention_eager,
    used_slots,
)

__all__ = ["causal_attention", "kept_attention"]


def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    limits: Tensor,
    scale: float,
    impl: Impl = "auto",
) -> Tensor:
    """Softmax attention of every query row over a prefix of its batch row's kept keys; grouped-query.

    Query row i of batch row b sees the keys at slots ``index[b, :limits[b, i]]``. Memory grows linearly in rows and
    keys, forward and backward; two runs give the same bits. A slot that some row of the batch row sees must hold
    finite numbers for all its rows (0 · NaN is NaN); slots that no row sees are never read.

    Args:
        query: (batch, heads, rows, dim), heads a multiple of kv_heads. key, value: (batch, kv_heads, length, dim).
            float32, bfloat16, float16, or float64 (eager only); dim in 16 … 256.
        index: (batch, keys) int64, the slots that may be seen, ascending. Entries at and beyond the largest limit of
            their batch row may be anything; those before it lie in [0, length) and differ from each other.
        limits: (batch, rows) int64 in [0, keys]; 0: sees nothing, and the output is 0. Any order is right; a
            nondecreasing one is fastest.
        scale: factor of the logits.
        impl: ``auto`` is Triton on CUDA devices (float64: eager), else eager.

    Returns:
        (batch, heads, rows, dim). Differentiable once in query, key and value.

    Raises:
        ValueError: a type, device, shape or memory layout is not as above; on the CPU and in eager also a limit or a
            slot that is out of range. Triton on a GPU does not look, so that nobody waits: it takes limits as the
            nearer end of [0, keys], and a slot outside [0, length) as a key and a value of zeros.
        BackendError: ``impl="triton"`` cannot run here.
    """
    _check_attention(query, key, value)
    batch, rows = query.shape[0], query.shape[2]
    for name, tensor in (("index", index), ("limits", limits)):
        if tensor.dtype != torch.int64 or tensor.ndim != 2 or tensor.shape[0] != batch:
            raise ValueError(
                f"{name} must be int64 with two dimensions, the first of {batch}, got {tensor.dtype} "
                f"of shape {tuple(tensor.shape)}"
            )
    if index.shape[1] == 0:
        raise ValueError(f"index must hold at least one key of every batch row, got shape {tuple(index.shape)}")
    if limits.shape[1] != rows:
        raise ValueError(f"limits must be (batch, rows) = {(batch, rows)}, got {tuple(limits.shape)}")
    if runs_triton(impl, query, key, value, index, limits, dtypes=TRITON_DTYPES):
        from sparsity_kernels.kept_attention.triton import kept_attention_triton

        if not query.is_cuda:
            check_limits(*map(int, torch.aminmax(limits)), index.shape[1])
            used_slots(index, limits, key.shape[2])
        return kept_attention_triton(query, key, value, index, limits, scale)
    return kept_attention_eager(query, key, value, index, limits, scale)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Plain causal attention, grouped-query: row i sees keys 0 … i. torch's own kernel on every device.

    Args:
        query: (batch, heads, length, dim), heads a multiple of kv_heads. key, value: (batch, kv_heads, length, dim).
        scale: factor of the logits.

    Returns:
        (batch, heads, length, dim), differentiable.

    Raises:
        ValueError: a type, shape or memory layout is not as above, or there are not as many rows as keys.
    """
    _check_attention(query, key, value)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"causal attention needs as many rows as keys, got {query.shape[2]} and {key.shape[2]}")
    return causal_attention_eager(query, key, value, scale)


def _check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_attention_tensors(4, query, key, value)
    batch, heads, _, dim = query.shape
    if value.shape != key.shape or key.shape[0] != batch or key.shape[3] != dim or heads % key.shape[1]:
        raise ValueError(
            "query (batch, heads, rows, dim), key and value (batch, kv_heads, length, dim) with heads a multiple of "
            f"kv_heads do not fit: got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_head_dim(dim)
