"""Eager reference of decode attention over a ragged cache (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_kernels.kept_attention.eager import attend_first

# Numbers per row of keys (keys * kv_heads * dim) below which the calls cost more than the sums: one padded call is then
# faster than a call for each row of the batch. Above it a call for each row is, since it reads no padding.
_SMALL_ROW = 32_768


def ragged_attention_eager(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, length: Tensor, scale: float, rectangular: int | None
) -> Tensor:
    """One fused call where the rows allow it, else one for each row of the batch. Takes the lengths to the host."""
    batch, _, rows, dim = query.shape
    lengths = length.tolist()
    shortest, longest = min(lengths), max(lengths)
    if longest <= 0:
        return torch.zeros_like(query)
    own = torch.arange(rows - 1, -1, -1, device=query.device)
    if rectangular is not None and shortest > 0:
        keys, values = (
            tensor.unflatten(0, (batch, rectangular))[:, :longest].transpose(1, 2) for tensor in (key, value)
        )
        small = longest * key.shape[1] * dim <= _SMALL_ROW
        if shortest == longest or small:
            return attend_first(query, keys, values, length[:, None] - own, shortest - rows + 1, scale)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for row, (first, count) in enumerate(zip(start.tolist(), lengths, strict=True)):
        if count <= 0:
            output[row] = 0.0
            continue
        keys, values = (tensor[first : first + count].transpose(0, 1)[None] for tensor in (key, value))
        output[row] = attend_first(query[row, None], keys, values, (count - own)[None], count - rows + 1, scale)[0]
    return output
