"""`sparse_attention(model, p=…)`: sparse prefill, a pruned cache and statistics for plain `model.generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from sparsity_forcing.attention.cache import PrunedLayer
from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.attention.functions import NAME
from sparsity_forcing.attention.stats import SparseStats
from sparsity_forcing.models.families import require_supported, visual_token_ids
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout


@contextmanager
def decoder_attention(model) -> Iterator[None]:
    """Runs the decoder (not the vision tower) on the registered attention function inside the block."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": NAME})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


@contextmanager
def sparse_attention(
    model, p: float | Tensor | None = None, settings: SparsityParams | None = None, **overrides
) -> Iterator[SparseStats]:
    """Makes `model.generate` and `model(...)` sparse inside the block and leaves the model as it was.

    Args:
        model: a supported vision-language model (see `models.families`).
        p: budget in (0, 1], for all rows or one per row, shape (batch,). Default: the settings' own.
        settings: how layers select; default `SparsityParams()`.
        overrides: single fields of the settings: ``rule``, ``rank_by``, ``scoring_rows``, ``prefill``,
            ``protect_text``, ``protect_first``, ``protect_last``, ``probe_recent``, ``probe_random``, ``probe_seed``.

    Yields:
        `SparseStats` of the last call inside the block. Of nested blocks on one model the innermost rules.

    Raises:
        ValueError: p or a setting is out of range, or the model's family is not supported.
    """
    require_supported(model.config)
    base = settings or SparsityParams()
    settings = SparsityParams.model_validate({**base.model_dump(), **overrides})
    budget = torch.as_tensor(settings.p if p is None else p, dtype=torch.float32)
    if budget.ndim > 1 or not bool(((budget > 0) & (budget <= 1)).all()):
        raise ValueError(f"budget p must be in (0, 1], one number or one per row, got {p!r}")
    stats = SparseStats()
    current: list[SparseContext] = []

    def enter(module, args, kwargs):
        if kwargs.get("sparse") is not None:  # a block inside this one, or a caller with a context of its own
            return None
        if args:
            raise ValueError("call the model with keyword arguments inside sparse_attention")
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            current[:] = [_begin(module, kwargs, settings, budget)]
            stats.record(current[0])
        elif not current or current[0].cache is not cache:
            raise ValueError("past_key_values was not made inside this sparse_attention block")
        return args, {**kwargs, "sparse": current[0]}

    handle = model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    try:
        with decoder_attention(model):
            yield stats
    finally:
        handle.remove()


def _begin(model, kwargs: dict, settings: SparsityParams, budget: Tensor) -> SparseContext:
    """A context for a new prompt; turns the empty cache of the call, if any, into a pruned one."""
    input_ids = kwargs.get("input_ids")
    if input_ids is None:
        raise ValueError("sparse attention needs input_ids to find the visual tokens, got inputs_embeds only")
    cache = kwargs.get("past_key_values")
    if cache is None and kwargs.get("use_cache"):
        raise ValueError("pass past_key_values=DynamicCache() with use_cache=True, or use_cache=False")
    if isinstance(cache, StaticCache):
        raise ValueError("a static cache cannot be pruned; leave out cache_implementation and past_key_values")
    if cache is None:
        kwargs["use_cache"] = False
    else:
        layers = model.config.get_text_config().num_hidden_layers
        cache.layers = [PrunedLayer() for _ in range(layers)]
    layout = PromptLayout.from_tokens(input_ids, kwargs.get("attention_mask"), visual_token_ids(model.config))
    if budget.ndim == 1 and budget.shape[0] != layout.batch:
        raise ValueError(f"p holds {budget.shape[0]} budgets for a batch of {layout.batch} rows")
    return SparseContext(settings, layout, budget.expand(layout.batch), cache)
