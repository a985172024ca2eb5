"""Rollouts: one sampled answer per row, every row with its own budget, through the pruned cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.attention.stats import layer_ratios
from sparsity_forcing.generation.forward import run_prefix, run_rest
from sparsity_forcing.generation.loop import Sampling, decode
from sparsity_forcing.generation.prompts import Prompts
from sparsity_forcing.params import SparsityParams


@dataclass(frozen=True)
class Rollouts:
    """The answers of ``queries * group`` rows and all that the update pass replays.

    ``completions``, ``completion_mask``, ``logps``: (rows, tokens); the mask covers sampled tokens, the stop token
    included. ``kept``, ``perturbed``: per layer (rows, prompt). ``selection_logps``: (layers, rows) log-density of the
    sampled selection; no layers where sigma is 0. ``p``, ``token_ratio``, ``visual_token_ratio``, ``truncated``,
    ``prompt_length``: (rows,). ``layer_ratio``, ``layer_visual_ratio``: (layers, rows). ``sigma``: of the selection.
    """

    completions: Tensor
    completion_mask: Tensor
    logps: Tensor
    kept: dict[int, Tensor]
    perturbed: dict[int, Tensor]
    selection_logps: Tensor
    p: Tensor
    token_ratio: Tensor
    visual_token_ratio: Tensor
    layer_ratio: Tensor
    layer_visual_ratio: Tensor
    truncated: Tensor
    prompt_length: Tensor
    sigma: float

    @property
    def length(self) -> Tensor:
        """(rows,) sampled tokens."""
        return self.completion_mask.sum(-1)


@torch.no_grad()
def roll_out(
    model,
    prompts: Prompts,
    p: Tensor,
    group: int,
    settings: SparsityParams,
    sampling: Sampling,
    sigma: float = 0.0,
    generator: torch.Generator | None = None,
    attention_dtype: torch.dtype | None = None,
    make_context: Callable[..., SparseContext] = SparseContext,
    cut_off: Callable[[], bool] = lambda: False,
) -> Rollouts:
    """Samples ``group`` answers per query, rows of a group next to each other.

    Args:
        model: in eval mode, its decoder on the registered attention function.
        p: (queries * group,) budgets.
        sigma: scale of the selection policy, 0 at deployment.
        generator: source of all randomness, on the model's device; needed unless greedy with sigma 0.
        attention_dtype: of attention among kept tokens; the model's where None.
        make_context: what selects, with the arguments of `SparseContext`.
        cut_off: asked between two tokens; once it is true the answers end as they are.
    """
    cache = run_prefix(model, prompts, group, room=sampling.max_new_tokens)
    layout = prompts.layout.repeat(group)
    context = make_context(
        settings, layout, p, cache, sigma=sigma, generator=generator, attention_dtype=attention_dtype
    )
    logits = run_rest(model, prompts, group, cache, None, None, context, keep=1)[:, -1]
    position = prompts.next_position.repeat_interleave(group)
    axes = len(prompts.position_ids)
    decoded = decode(model, cache, logits, position, axes, context, sampling, generator, cut_off=cut_off)
    context.check()
    ratio, visual = layer_ratios(context.kept, layout.valid), layer_ratios(context.kept, layout.visual)
    return Rollouts(
        completions=decoded.tokens,
        completion_mask=decoded.mask,
        logps=decoded.logps,
        kept=context.kept,
        perturbed=context.perturbed,
        selection_logps=context.stacked_selection_logps(),
        p=context.p,
        token_ratio=ratio.mean(0),
        visual_token_ratio=visual.mean(0),
        layer_ratio=ratio,
        layer_visual_ratio=visual,
        truncated=decoded.running,
        prompt_length=layout.valid.sum(-1),
        sigma=float(sigma),
    )
