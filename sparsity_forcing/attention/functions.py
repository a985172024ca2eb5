"""The attention and mask functions registered with transformers under `sparsity_forcing`.

One mask serves all layers, so the mask function returns the 2-D padding mask and the attention function does causality
and kept sets per layer. Without a context the attention is dense.
"""

from __future__ import annotations

import torch
from sparsity_kernels import kept_attention
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

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


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    rows, length = query.shape[2], key.shape[2]
    if mask is None and rows == length:
        return kept_attention(query, key, value, None, scale)
    return kept_attention(query, key, value, _causal(query, length, length - rows, mask), scale)


def _sparse(
    layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sparse: SparseContext
) -> Tensor:
    rows, prompt = query.shape[2], sparse.layout.length
    stored = sparse.cache.layers[layer] if sparse.cache is not None else None
    seen = stored.seen if stored is not None else key.shape[2]
    first = seen - rows  # logical slot of the first query row
    if first >= prompt:
        return _decode(query, key, value, stored, scale)
    if seen < prompt:  # a part of the prompt before its end: the visual prefix, dense and shared
        if sparse.settings.prefill == "sparse":
            raise RuntimeError("sparse prefill has no shared prefix; run the prompt in one pass")
        return _dense(query, key, value, mask, scale)

    columns = torch.arange(first, seen, device=query.device)
    kept = sparse.choose(layer, query, key, columns[columns < prompt], scale)
    visible, answered = _prompt_visibility(sparse, kept, query, key.shape[2], columns, mask)
    output = kept_attention(query, key, value, visible, scale)
    if answered is not None:
        output = output * answered[:, None, :, None]
    if stored is not None and sparse.replay is None:
        stored.prune(kept)
    return output


def _prompt_visibility(
    sparse: SparseContext, kept: Tensor, query: Tensor, length: int, columns: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What the rows at ``columns`` see, (batch, rows, length), and which rows attend at all (None: all).

    Completion rows always attend among kept prompt tokens and their own past; of the prompt rows those after the
    visual prefix (``suffix``), all (``sparse``) or none (``dense``).
    """
    prompt, prefill = sparse.layout.length, sparse.settings.prefill
    padded = torch.nn.functional.pad
    after = length - prompt
    in_prompt = columns < prompt
    inner = columns[in_prompt]
    if prefill == "suffix":
        restricted = padded(~sparse.layout.prefix[:, inner], (0, len(columns) - len(inner)), value=True)
    else:
        restricted = ((prefill == "sparse") | ~in_prompt).expand(query.shape[0], -1)
    keepable = padded(kept, (0, after), value=True)
    visible = _causal(query, length, int(columns[0]), mask)
    if mask is None:
        visible = visible & padded(sparse.layout.valid, (0, after), value=True)[:, None]
    visible = visible & (keepable[:, None, :] | ~restricted[:, :, None])
    answered = None
    if prefill == "sparse":
        answered = padded(kept, (0, after), value=True)[:, columns]
    return visible, answered


def _decode(query: Tensor, key: Tensor, value: Tensor, stored, scale: float) -> Tensor:
    """Generated rows over the pruned cache: every stored real entry, causal among themselves."""
    rows, length = query.shape[2], key.shape[2]
    if stored is None or stored.real is None:
        raise RuntimeError("decoding needs the pruned cache of this context's prefill: pass use_cache=True")
    visible = _causal(query, length, length - rows, stored.real)
    return kept_attention(query, key, value, visible, scale)


def _causal(query: Tensor, length: int, first: int, mask: Tensor | None) -> Tensor:
    """(batch, rows, length) bool: keys up to the row's own slot, ``first`` for the first row, and not padding."""
    batch, rows = query.shape[0], query.shape[2]
    slots = torch.arange(length, device=query.device)
    causal = slots[None, :] <= (first + torch.arange(rows, device=query.device))[:, None]
    if mask is None:
        return causal[None].expand(batch, -1, -1)
    return causal[None] & mask[:, None, :length]


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
