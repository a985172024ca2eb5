"""The two passes of every prompt: the visual prefix, shared by a group of answers, then what follows it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparsity_forcing.attention.cache import pruned_cache
from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.generation.prompts import Prompts


def run_prefix(model, prompts: Prompts, group: int, room: int = 0) -> Cache:
    """A cache that holds the visual prefix of every query ``group`` times; empty where nothing is shared.

    ``room``: entries that each row will have for generated tokens once the cache is pruned.
    The prefix is computed once per query. Gradients of all copies add up in it.
    """
    cache = pruned_cache(model.config.get_text_config().num_hidden_layers, room)
    if prompts.prefix:
        columns = slice(0, prompts.prefix)
        model(
            input_ids=prompts.input_ids[:, columns],
            attention_mask=prompts.layout.valid[:, columns],
            position_ids=_axes(prompts.position_ids[:, :, columns]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **prompts.media,
        )
        cache.batch_repeat_interleave(group)
    return cache


def run_rest(
    model,
    prompts: Prompts,
    group: int,
    cache: Cache,
    completions: Tensor | None,
    completion_valid: Tensor | None,
    sparse: SparseContext | None,
    keep: int,
) -> Tensor:
    """Logits of the last ``keep`` rows of suffix + completion, (queries * group, keep, vocabulary).

    Args:
        completions: (queries * group, tokens) ids that follow the prompt, or None.
        completion_valid: same shape, bool.
        sparse: the context of all rows; dense without it.
    """
    ids = prompts.input_ids[:, prompts.prefix :].repeat_interleave(group, 0)
    positions = prompts.position_ids[:, :, prompts.prefix :].repeat_interleave(group, 1)
    valid = prompts.layout.valid.repeat_interleave(group, 0)
    if completions is not None:
        steps = torch.arange(completions.shape[1], device=ids.device)
        following = prompts.next_position.repeat_interleave(group)[:, None] + steps
        ids = torch.cat([ids, completions], dim=1)
        positions = torch.cat([positions, following.expand(len(positions), -1, -1)], dim=2)
        valid = torch.cat([valid, completion_valid], dim=1)
    media = prompts.media if not prompts.prefix else {}
    return model(
        input_ids=ids,
        attention_mask=valid,
        position_ids=_axes(positions),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
        sparse=sparse,
        **media,
    ).logits


def decode_step(model, cache: Cache, tokens: Tensor, positions: Tensor, axes: int, sparse: SparseContext) -> Tensor:
    """Logits (rows, vocabulary) after one generated token a row. ``tokens``, ``positions``: (rows,)."""
    return model(
        input_ids=tokens[:, None],
        position_ids=_axes(positions[None, :, None].expand(axes, -1, -1)),
        past_key_values=cache,
        use_cache=True,
        sparse=sparse,
    ).logits[:, -1]


def _axes(position_ids: Tensor) -> Tensor:
    """Multimodal rotary embeddings take (3, batch, length), ordinary ones (batch, length)."""
    return position_ids if position_ids.shape[0] > 1 else position_ids[0]


def token_logps(logits: Tensor, tokens: Tensor, temperature: float, suppressed: Tensor) -> Tensor:
    """(rows, tokens) log-probabilities of ``tokens`` under the sampling distribution, at least float32.

    Args:
        logits: (rows, tokens, vocabulary). temperature: the one sampled with.
        suppressed: ids that are never sampled (image and video placeholders).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if len(suppressed):
        logits = logits.index_fill(-1, suppressed, -torch.inf)
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)
