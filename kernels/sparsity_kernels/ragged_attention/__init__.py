"""Decode attention over a ragged cache. README.md has the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_kernels.backend import TRITON_DTYPES, Impl, runs_triton
from sparsity_kernels.checks import check_attention_tensors, check_head_dim
from sparsity_kernels.ragged_attention.eager import check_extents, ragged_attention_eager

__all__ = ["ragged_attention"]

_MOST_ROWS = 64


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    impl: Impl = "auto",
    rectangular: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """Softmax attention of a few new rows over each batch row's own entries of one buffer; grouped-query.

    Batch row b owns the entries ``start[b]`` … ``start[b] + length[b] - 1``; the last of them are those of its query
    rows, so query row i of ``rows`` sees the first ``length[b] - (rows - 1 - i)``. A row that sees nothing gives zeros.
    Entries that no batch row owns are never used: they may hold anything, also what is not a number. With
    ``rectangular`` those behind a row must be zero, as in a `RaggedCache`: eager masks them.

    Args:
        query: (batch, heads, rows, dim), 1 … 64 rows (one in a decode step), heads a multiple of kv_heads.
        key, value: (entries, kv_heads, dim). float32, bfloat16, float16, or float64 (eager only); dim in 16 … 256.
        start: (batch,) int64. length: (batch,) int32; 0 and less: owns nothing. Entries a row owns lie in the buffer.
        scale: factor of the logits.
        impl: ``auto`` is Triton on CUDA devices (float64: eager), else eager.
        rectangular: capacity of a batch row where ``start[b] == b * rectangular`` and entries == batch * rectangular:
            eager then may serve all rows in one call. No length is larger. None: anywhere.
        splits: into how many parts the Triton kernel divides a row's entries, 1 … 128; None chooses from shapes and
            device, never from lengths, so that a CUDA graph serves all lengths. Eager takes no notice.

    Returns:
        (batch, heads, rows, dim). For inference: there is no gradient.

    Raises:
        ValueError: a type, device, shape or memory layout is not as above, or a gradient is asked for; on the CPU and
            in eager also entries outside the buffer or not as ``rectangular`` says. Triton on a GPU does not look, so
            that nobody waits: a row ends at the end of the buffer, and one that starts outside it sees nothing.
        BackendError: ``impl="triton"`` cannot run here.
    """
    _check(query, key, value, start, length, rectangular, splits)
    if runs_triton(impl, query, key, value, start, length, dtypes=TRITON_DTYPES):
        from sparsity_kernels.ragged_attention.triton import ragged_attention_triton

        if not query.is_cuda:
            check_extents(start.tolist(), length.tolist(), key.shape[0], rectangular)
        capacity = key.shape[0] // query.shape[0] if rectangular is None else rectangular
        return ragged_attention_triton(query, key, value, start, length, scale, capacity, splits)
    return ragged_attention_eager(query, key, value, start, length, scale, rectangular)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    length: Tensor,
    rectangular: int | None,
    splits: int | None,
) -> None:
    check_attention_tensors(3, query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"ragged_attention has no gradient, and {name} requires one: use torch.no_grad()")
    batch, heads, rows, dim = query.shape
    if value.shape != key.shape or key.shape[2] != dim or heads % key.shape[1]:
        raise ValueError(
            "query (batch, heads, rows, dim), key and value (entries, kv_heads, dim) with heads a multiple of kv_heads "
            f"do not fit: got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_head_dim(dim)
    if rows > _MOST_ROWS:
        raise ValueError(f"query must have at most {_MOST_ROWS} rows, got {rows}")
    for name, tensor, dtype in (("start", start, torch.int64), ("length", length, torch.int32)):
        if tensor.shape != (batch,) or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} of shape ({batch},), got {tensor.dtype} {tuple(tensor.shape)}")
    if rectangular is not None and key.shape[0] != batch * rectangular:
        raise ValueError(
            f"rectangular={rectangular} needs batch * rectangular = {batch * rectangular} entries, got {key.shape[0]}"
        )
    if splits is not None and not 1 <= splits <= 128:
        raise ValueError(f"splits must be in 1 … 128, got {splits}")
