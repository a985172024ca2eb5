"""`sparse_generate`: answers through the shared visual prefix and the fused decode loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.attention.stats import SparseStats
from sparsity_forcing.generation.forward import run_prefix, run_rest
from sparsity_forcing.generation.loop import Sampling, decode
from sparsity_forcing.generation.prefix import VisualPrefix
from sparsity_forcing.generation.prompts import build_prompts, shares_prefix
from sparsity_forcing.models.families import require_supported, visual_token_ids
from sparsity_forcing.params import SparsityParams


@dataclass(frozen=True)
class Generation:
    """``tokens``, ``mask``: (rows, tokens), new tokens only; the mask covers those before and with the stop token.
    ``logps``: their log-probabilities. ``truncated``: (rows,) bool. ``stats``: of the kept sets and the cache.
    ``prefix``: the dense visual prefix where it was asked for."""

    tokens: Tensor
    mask: Tensor
    logps: Tensor
    truncated: Tensor
    stats: SparseStats
    prefix: VisualPrefix | None = None


@torch.no_grad()
def sparse_generate(
    model,
    inputs: dict,
    p: float | Tensor | None = None,
    settings: SparsityParams | None = None,
    *,
    num_return_sequences: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    cuda_graph: bool | None = None,
    keep_prefix: bool = False,
    prefix: VisualPrefix | None = None,
    **overrides,
) -> Generation:
    """Answers prompts sparsely, each ``num_return_sequences`` times, its visual prefix computed once.

    What `model.generate` gives inside `sparse_attention`, in less time: the answers of a prompt share its visual
    prefix, and the decode loop keeps its buffers in place.

    Args:
        model: a supported vision-language model in eval mode.
        inputs: what its processor made of a batch of prompts, padded on the left.
        p: budget in (0, 1], one number or one per answer, shape (batch * num_return_sequences,).
        settings, overrides: as for `sparse_attention`.
        temperature: 0 is greedy. generator: source of the samples, on the model's device; needed unless greedy.
        cuda_graph: see `generation.loop.decode`.
        keep_prefix: return the dense visual prefix, for further questions about the same images.
        prefix: that of an earlier call, so that it is not computed again; the answers are the same, as each question
            selects from it for itself.

    Raises:
        ValueError: p or another argument is out of range, the inputs are padded on the right, the family is not
            supported, a generator is missing, there is no visual prefix to keep, ``prefix`` is of other prompts or of
            another model, or attention logits are not finite.
    """
    require_supported(model.config)
    settings = SparsityParams.model_validate({**(settings or SparsityParams()).model_dump(), **overrides})
    if temperature and generator is None:
        raise ValueError(f"sampling at temperature {temperature} needs a generator; or set temperature=0")
    for name, value in (("num_return_sequences", num_return_sequences), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    prompts = build_prompts(model, inputs, settings, encode_images=prefix is None)
    group, rows = num_return_sequences, prompts.queries * num_return_sequences
    budget = torch.as_tensor(settings.p if p is None else p, dtype=torch.float32)
    if budget.ndim > 1 or not bool(((budget > 0) & (budget <= 1)).all()):
        raise ValueError(f"budget p must be in (0, 1], one number or one per answer, got {p!r}")
    if budget.ndim == 1 and len(budget) != rows:
        raise ValueError(f"p holds {len(budget)} budgets for {rows} answers")
    if group > 1 and not shares_prefix(settings):
        raise ValueError(
            f"with prefill {settings.prefill!r} and scoring_rows {settings.scoring_rows!r} answers share no visual "
            "prefix; repeat the prompt in inputs instead of num_return_sequences"
        )
    stop = model.generation_config.eos_token_id
    stop = () if stop is None else tuple(stop) if isinstance(stop, list) else (stop,)
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else stop[0] if stop else 0
    suppressed = torch.tensor(visual_token_ids(model.config), device=model.device)
    sampling = Sampling(temperature, max_new_tokens, stop, pad, suppressed)
    with decoder_attention(model):
        if keep_prefix and prefix is None:
            prefix = VisualPrefix.of(model, prompts, inputs)
        if prefix is None:
            cache = run_prefix(model, prompts, group, room=max_new_tokens)
        else:
            cache = prefix.cache(model, prompts, inputs, group, room=max_new_tokens)
        context = SparseContext(settings, prompts.layout.repeat(group), budget.expand(rows), cache)
        logits = run_rest(model, prompts, group, cache, None, None, context, keep=1)[:, -1]
        position = prompts.next_position.repeat_interleave(group)
        axes = len(prompts.position_ids)
        found = decode(model, cache, logits, position, axes, context, sampling, generator, cuda_graph)
    context.check()
    stats = SparseStats()
    stats.record(context)
    kept = prefix if keep_prefix else None
    return Generation(found.tokens, found.mask, found.logps, found.running, stats, kept)
