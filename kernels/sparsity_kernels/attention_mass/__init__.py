"""Attention mass: column sums of causal attention over scoring rows (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_kernels.attention_mass import eager
from sparsity_kernels.backend import TRITON_DTYPES, Impl, runs_triton
from sparsity_kernels.checks import DTYPES, check_head_dim, dtype_name, form

__all__ = ["attention_mass"]


def attention_mass(
    query: Tensor,
    key: Tensor,
    slots: Tensor,
    valid: Tensor,
    scale: float,
    impl: Impl = "auto",
    lse: Tensor | None = None,
) -> Tensor:
    """Column sums of the causal attention map over the scoring rows, mean over query heads.

    Memory is linear in ``rows + length``, forward and backward: the map is never stored. Values that are not finite,
    also in padding, may spread to the whole mass.

    Args:
        query: (batch, heads, rows, dim), the scoring rows only. Last dimension contiguous, any other strides.
        key: (batch, kv_heads, length, dim), dtype of ``query``; ``heads`` is a multiple of ``kv_heads``.
        slots: (batch, rows) int64, the key slot of every scoring row; the row with slot c sees key j where j <= c and
            ``valid``. Negative: no scoring row (padding), adds nothing. Any order; ascending is fastest.
        valid: (batch, length) bool, False for padding keys. A row that sees no key adds nothing.
        scale: factor of the logits.
        impl: see `sparsity_kernels.backend`. The Triton kernels take float32, bfloat16 and float16 and ``dim`` from 16
            to 256; eager takes float64 too, and ``auto`` uses it for float64.
        lse: (batch, heads, rows) natural log of the sum of exp(logit) over the keys a row sees, in the result's dtype,
            where a forward has it already; saves one of two products. Any value where a row sees nothing.
            Gradients are those of the mass without ``lse``: nothing flows into it.

    Returns:
        (batch, length) mass a_j = sum over rows of the mean over heads of softmax(q k^T * scale)_j, float32 (float64
        for float64 input). Differentiable once in ``query`` and ``key``.

    Raises:
        ValueError: dtypes, shapes, strides or devices do not fit.
        BackendError: ``impl="triton"`` cannot run here.
    """
    tensors = (query, key, slots, valid) if lse is None else (query, key, slots, valid, lse)
    _check(query, key, slots, valid, lse)
    function = eager.AttentionMass
    if runs_triton(impl, *tensors, dtypes=TRITON_DTYPES):
        check_head_dim(query.shape[-1])
        from sparsity_kernels.attention_mass import triton

        function = triton.AttentionMass
    return function.apply(query, key, slots, valid, scale, lse)


def _check(query: Tensor, key: Tensor, slots: Tensor, valid: Tensor, lse: Tensor | None) -> None:
    if query.dtype not in DTYPES or query.ndim != 4:
        allowed = "(batch, heads, rows, dim) float32, bfloat16, float16 or float64"
        raise ValueError(f"query must be {allowed}, got {form(query)}")
    batch, heads, rows, dim = query.shape
    if key.dtype != query.dtype or key.ndim != 4 or key.shape[0] != batch or key.shape[3] != dim:
        allowed = f"({batch}, kv_heads, length, {dim}) {dtype_name(query.dtype)} to fit query"
        raise ValueError(f"key must be {allowed}, got {form(key)}")
    kv_heads, length = key.shape[1:3]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads ({heads}) must be a multiple of key heads ({kv_heads}), at least 1 each")
    for name, tensor in (("query", query), ("key", key)):
        if dim > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    wide = torch.promote_types(query.dtype, torch.float32)
    expected = [("slots", slots, (batch, rows), torch.int64), ("valid", valid, (batch, length), torch.bool)]
    if lse is not None:
        expected.append(("lse", lse, (batch, heads, rows), wide))
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {shape} {dtype_name(dtype)}, got {form(tensor)}")
