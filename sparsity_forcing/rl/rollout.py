"""Rollouts: one sampled answer per row, every row with its own budget, through the pruned cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.attention.stats import layer_ratios
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.rl.forward import decode_step, run_prefix, run_rest, token_logps
from sparsity_forcing.rl.prompts import Prompts


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. ``temperature`` 0 is greedy. ``suppressed``: ids that are never sampled."""

    temperature: float
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    suppressed: Tensor


@dataclass(frozen=True)
class Rollouts:
    """The answers of ``queries * group`` rows and all that the update pass replays.

    ``completions``, ``completion_mask``, ``logps``: (rows, tokens); the mask covers sampled tokens, the stop token
    included. ``kept``, ``perturbed``: per layer (rows, prompt). ``selection_logps``: (layers, rows) log-density of the
    sampled selection; no layers where sigma is 0. ``p``, ``token_ratio``, ``visual_token_ratio``, ``truncated``:
    (rows,). ``layer_ratio``, ``layer_visual_ratio``: (layers, rows).
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
) -> Rollouts:
    """Samples ``group`` answers per query, rows of a group next to each other.

    Args:
        model: in eval mode, its decoder on the registered attention function.
        p: (queries * group,) budgets.
        sigma: scale of the selection policy, 0 at deployment.
        generator: source of all randomness, on the model's device; needed unless greedy with sigma 0.
    """
    cache = run_prefix(model, prompts, group)
    layout = prompts.layout.repeat(group)
    context = SparseContext(settings, layout, p, cache, sigma=sigma, generator=generator)
    logits = run_rest(model, prompts, group, cache, None, None, context, keep=1)[:, -1]

    rows, axes = layout.batch, prompts.position_ids.shape[0]
    position = prompts.next_position.repeat_interleave(group)
    stop = torch.tensor(sampling.stop_ids, device=logits.device)
    running = torch.ones(rows, dtype=torch.bool, device=logits.device)
    tokens, masks, logps = [], [], []
    for step in range(sampling.max_new_tokens):
        chosen = _sample(logits, sampling, generator).masked_fill(~running, sampling.pad_id)
        logps.append(token_logps(logits[:, None], chosen[:, None], sampling.temperature or 1.0, sampling.suppressed))
        tokens.append(chosen)
        masks.append(running)
        running = running & ~torch.isin(chosen, stop)
        if step + 1 == sampling.max_new_tokens or not bool(running.any()):
            break
        logits = decode_step(model, cache, chosen, position + step, axes, context)

    mask = torch.stack(masks, dim=1)
    ratio, visual = layer_ratios(context.kept, layout.valid), layer_ratios(context.kept, layout.visual)
    return Rollouts(
        completions=torch.stack(tokens, dim=1),
        completion_mask=mask,
        logps=torch.cat(logps, dim=1).masked_fill(~mask, 0.0),
        kept=context.kept,
        perturbed=context.perturbed,
        selection_logps=context.stacked_selection_logps(),
        p=context.p,
        token_ratio=ratio.mean(0),
        visual_token_ratio=visual.mean(0),
        layer_ratio=ratio,
        layer_visual_ratio=visual,
        truncated=running,
    )


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    if len(sampling.suppressed):
        logits = logits.index_fill(-1, sampling.suppressed, -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
