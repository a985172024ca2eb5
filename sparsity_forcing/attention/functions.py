"""The attention and mask functions registered with transformers under `sparsity_forcing`.

One mask serves all layers, so the mask function returns the 2-D padding mask and the attention function does causality
and kept sets per layer. Without a context the attention is dense. Nothing here is of size rows x keys: what a row may
see is a list of key slots and the length of the part of it that lies behind the row.
"""

from __future__ import annotations

import torch
from sparsity_kernels import Impl, causal_attention, kept_attention, ragged_attention
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from sparsity_forcing.attention.cache import PrunedLayer
from sparsity_forcing.attention.context import SparseContext

NAME = "sparsity_forcing"


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **_: object
) -> Tensor | None:
    """(batch, kv_length) bool, True for real tokens; None where nothing is padded."""
    if attention_mask is None or attention_mask.ndim != 2:
        return attention_mask
    mask = attention_mask[:, :kv_length].bool()
    return None if bool(mask.all()) else mask


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sparse: SparseContext | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one decoder layer.

    Args:
        query: (batch, heads, rows, dim). key, value: (batch, kv_heads, stored, dim), what the cache returned.
        attention_mask: (batch, seen) bool padding mask or None.
        sparse: the context; dense attention without it.

    Returns:
        (batch, rows, heads, dim) and None for the attention map.
    """
    if getattr(module, "sliding_window", None):
        raise ValueError("sliding-window attention layers are not supported; set use_sliding_window to false")
    if dropout:
        raise ValueError(f"attention dropout ({dropout}) is not supported: kept sets would not see it")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if sparse is None:
        output = _dense(query, key, value, attention_mask, scale)
    else:
        output = _sparse(module.layer_idx, query, key, value, attention_mask, scale, sparse)
    return output.transpose(1, 2).contiguous(), None


def _dense(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float, impl: Impl = "auto"
) -> Tensor:
    """Causal attention of the last ``rows`` slots among the keys that are not padding."""
    rows, length = query.shape[2], key.shape[2]
    if valid is None and rows == length:
        return causal_attention(query, key, value, scale)
    if valid is None:
        valid = torch.ones(query.shape[0], length, dtype=torch.bool, device=query.device)
    index, seen = _listed(valid[:, :length])
    return kept_attention(query, key, value, index, seen[:, length - rows :], scale, impl)


def _sparse(
    layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sparse: SparseContext
) -> Tensor:
    rows, prompt = query.shape[2], sparse.layout.length
    stored = sparse.cache.layers[layer] if sparse.cache is not None else None
    seen = stored.seen if stored is not None else key.shape[2]
    first = seen - rows  # logical slot of the first query row
    if first >= prompt:
        return _decode(query, stored, scale, sparse)
    if seen < prompt:  # a part of the prompt before its end: the visual prefix, dense and shared
        if sparse.settings.prefill == "sparse":
            raise RuntimeError("sparse prefill has no shared prefix; run the prompt in one pass")
        if stored is None:  # a pruned cache gives its new entries only: attention to them alone would be wrong
            raise RuntimeError("a context that was made without the cache takes the whole prompt in one pass")
        return _dense(query, key, value, mask, scale, sparse.settings.impl)

    kept = sparse.choose(layer, query, key, first, scale)
    dtype = query.dtype
    query, key, value = (tensor.to(sparse.attention_dtype or dtype) for tensor in (query, key, value))
    if sparse.settings.prefill == "sparse":
        output = _all_sparse(query, key, value, mask, kept, scale, sparse)
    else:
        output = _dense_then_sparse(query, key, value, mask, kept, first, scale, sparse)
    if stored is not None and sparse.replay is None:
        stored.prune(kept, sparse.settings.impl, sparse.attention_dtype)
        if layer > 0:
            sparse.cache.layers[layer - 1].settle()
    return output.to(dtype)


def _dense_then_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kept: Tensor,
    first: int,
    scale: float,
    sparse: SparseContext,
) -> Tensor:
    """Rows before a batch row's ``dense_until`` see every token before them, the rows after it kept tokens only.

    ``first``: slot of the first query row. Where the batch rows change over at different slots, the slots between are
    computed both ways.
    """
    seen = first + query.shape[2]
    earliest, latest = sparse.dense_until
    change, end = max(first, earliest), max(first, latest)
    parts = []
    if end > first:
        valid = _valid(mask, sparse, end) if sparse.padded else None
        dense = _dense(
            query[:, :, : end - first], key[:, :, :end], value[:, :, :end], valid, scale, sparse.settings.impl
        )
        parts.append(dense[:, :, : change - first])
    if change < seen:
        index, counts = _listed(pad(kept, (0, seen - kept.shape[1]), value=True) & _valid(mask, sparse, seen))
        rows = query[:, :, change - first :]
        after = kept_attention(rows, key, value, index, counts[:, change:], scale, sparse.settings.impl)
        if end > change:
            still_dense = sparse.dense_rows[:, change:end, None][:, None]
            parts.append(torch.where(still_dense, dense[:, :, change - first :], after[:, :, : end - change]))
        parts.append(after[:, :, end - change :])
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _all_sparse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kept: Tensor, scale: float, sparse: SparseContext
) -> Tensor:
    """Kept rows attend among kept keys; the others' output is zero. Only kept rows are computed."""
    seen = query.shape[2]
    keepable = pad(kept, (0, seen - kept.shape[1]), value=True) & _valid(mask, sparse, seen)
    index, counts = _listed(keepable)
    if not query.is_cuda:  # on a GPU the kernel skips what lies beyond a row's count, and nobody waits for the count
        index = index[:, : int(counts[:, -1].max())]
    places = torch.arange(index.shape[1], device=query.device)
    limits = torch.where(places < counts[:, -1:], places + 1, 0)
    expand = lambda slots: slots[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])  # noqa: E731
    compact = query.gather(2, expand(index))
    output = kept_attention(compact, key, value, index, limits, scale, sparse.settings.impl)
    output = output.gather(2, expand((counts - 1).clamp_min(0)))
    return output * keepable[:, None, :, None]


def _decode(query: Tensor, stored: PrunedLayer | None, scale: float, sparse: SparseContext) -> Tensor:
    """Generated rows over the pruned cache: every stored entry, causal among themselves."""
    if stored is None or stored.ragged is None:
        raise RuntimeError("decoding needs the pruned cache of this context's prefill: pass use_cache=True")
    cache = stored.ragged
    output = ragged_attention(
        query.to(cache.key.dtype),
        cache.key,
        cache.value,
        cache.start,
        cache.length,
        scale,
        impl=sparse.settings.impl,
        rectangular=cache.rectangular,
    )
    return output.to(query.dtype)


def _valid(mask: Tensor | None, sparse: SparseContext, length: int) -> Tensor:
    """(batch, length) bool: slots that are not padding, those after the prompt included."""
    if mask is not None:
        return mask[:, :length]
    valid = sparse.layout.valid
    return valid[:, :length] if length <= valid.shape[1] else pad(valid, (0, length - valid.shape[1]), value=True)


def _listed(keepable: Tensor) -> tuple[Tensor, Tensor]:
    """The slots that are True, ascending (batch, length), zeros behind them, and how many lie up to each slot.

    Counted on the device: nobody waits for it.
    """
    counts = keepable.cumsum(-1)
    length = keepable.shape[1]
    slots = torch.arange(length, device=keepable.device).expand_as(counts)
    index = torch.zeros(len(counts), length + 1, dtype=torch.long, device=keepable.device)
    index.scatter_(1, torch.where(keepable, counts - 1, length), slots)
    return index[:, :length], counts


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
