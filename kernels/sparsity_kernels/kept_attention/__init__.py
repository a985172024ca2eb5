"""Attention for prefill and training: among kept keys by index, and plain causal. README.md has the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_kernels.backend import Impl, runs_triton
from sparsity_kernels.kept_attention.eager import causal_attention_eager, kept_attention_eager

__all__ = ["causal_attention", "kept_attention"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    keys, forward and backward; two runs give the same bits. In eager, a slot that some row of the batch row sees must
    hold finite numbers for all its rows; slots that no row sees are never read.

    Args:
        query: (batch, heads, rows, dim), heads a multiple of kv_heads. key, value: (batch, kv_heads, length, dim).
            float32, bfloat16, float16, or float64 (eager only); dim in 16 … 256.
        index: (batch, keys) int64, the slots that may be seen, ascending. Entries at and beyond the row's largest
            limit are not used, but lie in [0, length); those before it differ from each other.
        limits: (batch, rows) int64 in [0, keys]; 0: sees nothing, and the output is 0. Any order is right; a
            nondecreasing one is fastest.
        scale: factor of the logits.
        impl: ``auto`` is Triton on CUDA devices (float64: eager), else eager.

    Returns:
        (batch, heads, rows, dim). Differentiable once in query, key and value.

    Raises:
        ValueError: a type, device, shape or memory layout is not as above. Values of index and limits are not checked.
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
    wide = query.dtype == torch.float64
    if runs_triton(impl, query, key, value, index, limits) and not (wide and impl == "auto"):
        if wide:
            raise ValueError('impl="triton" takes float32, bfloat16 or float16, got torch.float64')
        from sparsity_kernels.kept_attention.triton import kept_attention_triton

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
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have four dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                "query, key and value must share one of float32, bfloat16, float16, float64, got "
                f"{query.dtype}, {key.dtype}, {value.dtype}"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    batch, heads, _, dim = query.shape
    if value.shape != key.shape or key.shape[0] != batch or key.shape[3] != dim or heads % key.shape[1]:
        raise ValueError(
            "query (batch, heads, rows, dim), key and value (batch, kv_heads, length, dim) with heads a multiple of "
            f"kv_heads do not fit: got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if not 16 <= dim <= 256:
        raise ValueError(f"head dim must be in 16 … 256, got {dim}")
