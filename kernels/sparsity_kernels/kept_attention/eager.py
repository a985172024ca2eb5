"""Eager reference of attention among kept keys (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

_BLOCK_ROWS = 512  # query rows times heads of a group in one block: what bounds the mask and the logits


def causal_attention_eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """torch's fused causal attention; it never holds the map."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def kept_attention_eager(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, limits: Tensor, scale: float
) -> Tensor:
    """Gathers the kept keys, then attends in blocks of query rows.

    A block reads keys up to its own largest limit. Where there are several blocks and a gradient is wanted, each is
    recomputed in the backward pass, so that memory grows linearly in rows and keys. Takes the limits to the host.

    Raises:
        ValueError: a limit or a slot that is used is out of range.
    """
    block = max(1, _BLOCK_ROWS * key.shape[1] // query.shape[1])
    parts = limits.split(block, dim=1)
    bounds = [[int(bound) for bound in torch.aminmax(part)] for part in parts]
    longest = max(largest for _, largest in bounds)
    check_limits(min(smallest for smallest, _ in bounds), longest, index.shape[1])
    keys, values = _gather(key, value, index[:, : max(1, longest)], limits)
    several = len(parts) > 1 and torch.is_grad_enabled()
    recompute = several and any(tensor.requires_grad for tensor in (query, key, value))
    outputs = []
    for rows, part, (smallest, largest) in zip(query.split(block, dim=2), parts, bounds, strict=True):
        seen = max(1, largest)
        arguments = (rows, keys[:, :, :seen], values[:, :, :seen], part, smallest, scale)
        if recompute:
            outputs.append(checkpoint(attend_first, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(attend_first(*arguments))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def attend_first(query: Tensor, key: Tensor, value: Tensor, limits: Tensor, smallest: int, scale: float) -> Tensor:
    """Attention of query row i over the first ``limits[b, i]`` keys; 0 for rows that see nothing.

    The query heads of a group become rows of their key head: torch's fused CPU kernel reads the keys once per group
    that way, and takes grouped queries only by repeating the keys.

    Args:
        query: (batch, heads, rows, dim). key, value: (batch, kv_heads, keys, dim), at least one key.
        limits: (batch, rows). smallest: the smallest of them, on the host.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    mask = None
    if smallest < keys:
        filled = limits if smallest > 0 else limits.clamp_min(1)  # a row without keys would be 0/0: blanked below
        seen = torch.arange(keys, device=key.device) < filled[..., None]
        mask = seen.repeat(1, group, 1)[:, None]
    folded = query.reshape(batch, kv_heads, group * rows, dim)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    output = output.reshape(batch, heads, rows, dim)
    if smallest > 0:
        return output
    return output.masked_fill((limits <= 0)[:, None, :, None], 0.0)


def check_limits(smallest: int, largest: int, keys: int) -> None:
    """ValueError where limits reach outside ``index``."""
    if smallest < 0 or largest > keys:
        raise ValueError(f"limits must be in [0, {keys}], as index lists {keys} keys, got {smallest} … {largest}")


def used_slots(index: Tensor, limits: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
    """(batch, keys) ``index``, where no row looks a slot that may be read; and (batch, 1) which samples see nothing.

    None: every sample sees a key.

    Raises:
        ValueError: a slot that is used is outside [0, length).
    """
    longest = limits.amax(1, keepdim=True)
    inside = torch.arange(index.shape[1], device=index.device) < longest
    slots = torch.where(inside, index, index[:, :1])
    unseen = longest <= 0
    if bool(unseen.any()):  # a sample without any key has no slot that is used
        slots = slots.masked_fill(unseen, 0)
    else:
        unseen = None
    first, last = (int(slot) for slot in torch.aminmax(slots))
    if first < 0 or last >= length:
        raise ValueError(f"index must hold slots in [0, {length}) within the limits, got {first} … {last}")
    return slots, unseen


def _gather(key: Tensor, value: Tensor, index: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, kv_heads, keys, dim) at the slots of ``index``, whose entries beyond a row's limits are not read."""
    batch, kv_heads, length, dim = key.shape
    slots, unseen = used_slots(index, limits, length)
    heads = torch.arange(batch * kv_heads, device=index.device).view(batch, kv_heads, 1) * length
    flat = (heads + slots[:, None]).flatten()
    shape = (batch, kv_heads, index.shape[1], dim)
    keys = key.reshape(-1, dim).index_select(0, flat).view(shape)
    values = value.reshape(-1, dim).index_select(0, flat).view(shape)
    if unseen is not None:
        keys, values = (tensor.masked_fill(unseen[..., None, None], 0.0) for tensor in (keys, values))
    return keys, values
