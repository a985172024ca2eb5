"""Eager reference of decode attention over a ragged cache (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_kernels.checks import some
from sparsity_kernels.kept_attention.eager import attend_first

# Numbers per row of keys (keys * kv_heads * dim) below which the calls cost more than the sums: one padded call is then
# faster than a call for each row of the batch. Above it a call for each row is, since it reads no padding.
_SMALL_ROW = 32_768


def ragged_attention_eager(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, length: Tensor, scale: float, rectangular: int | None
) -> Tensor:
    """One fused call where the rows allow it, else one for each row of the batch. Takes the lengths to the host.

    Raises:
        ValueError: a row owns entries outside the buffer, or ``rectangular`` does not hold.
    """
    batch, _, rows, dim = query.shape
    starts, lengths = start.tolist(), length.tolist()
    check_extents(starts, lengths, key.shape[0], rectangular)
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
    for row, (first, count) in enumerate(zip(starts, lengths, strict=True)):
        if count <= 0:
            output[row] = 0.0
            continue
        keys, values = (tensor[first : first + count].transpose(0, 1)[None] for tensor in (key, value))
        output[row] = attend_first(query[row, None], keys, values, (count - own)[None], count - rows + 1, scale)[0]
    return output


def check_extents(starts: list[int], lengths: list[int], entries: int, rectangular: int | None) -> None:
    """ValueError where a row owns entries outside the buffer of ``entries``, or ``rectangular`` does not hold."""
    if rectangular is not None:  # the buffer is as large as all its rows: nothing more to look at
        if starts != list(range(0, entries, rectangular)):
            raise ValueError(f"rectangular={rectangular} needs start[b] = b * {rectangular}, got {some(starts)}")
        if max(lengths) > rectangular:
            raise ValueError(f"length must be at most rectangular={rectangular}, got {some(lengths)}")
        return
    ends = [first + max(count, 0) for first, count in zip(starts, lengths, strict=True)]
    if min(starts) < 0 or max(ends) > entries:
        raise ValueError(
            f"start and start + length must be in [0, {entries}], the entries of the buffer, got start "
            f"{some(starts)} and length {some(lengths)}"
        )
