"""The GRPO loss with the selection term: a pure function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity_forcing.params import TrainParams


@dataclass(frozen=True)
class LossInputs:
    """``per_token_logps``, ``old_logps``, ``ref_logps``: (rows, tokens) float32; ``completion_mask``: same, bool.

    ``advantages``: (rows,). ``selection_logps``, ``old_selection_logps``, ``selection_advantages``: (layers, rows), no
    layers where selection is deterministic.
    """

    per_token_logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    completion_mask: Tensor
    advantages: Tensor
    selection_logps: Tensor
    old_selection_logps: Tensor
    selection_advantages: Tensor


@dataclass(frozen=True)
class Totals:
    """Of a whole step, all its micro-batches and processes: ``rows`` rollouts, ``tokens`` tokens that count."""

    rows: int
    tokens: int


def grpo_loss(
    inputs: LossInputs, config: TrainParams, totals: Totals | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss to minimise and its metrics.

    Token term: −min(ρA, clip(ρ)A) + β·KL with ρ the ratio of current to rollout probability and KL the k3 estimate
    exp(d) − d − 1, d = log π_ref − log π (Schulman, "Approximating KL divergence"). Selection term: the same clipped
    surrogate on the density of the sampled selection, one ratio per layer and rollout, summed over layers, times
    `selection_policy.weight`.

    On-policy both ratios are 1, so the loss itself is near 0 (mean advantage 0); its gradient is not.

    Args:
        totals: of the step that ``inputs`` are a part of; without it they are the whole. Losses and metrics of the
            parts add up to those of the whole.
    """
    totals = totals or Totals(len(inputs.advantages), int(inputs.completion_mask.sum()))
    mask = inputs.completion_mask.float()
    advantages = inputs.advantages[:, None]
    surrogate, clipped = _clipped_surrogate(
        inputs.per_token_logps - inputs.old_logps, advantages, config.epsilon, config.epsilon_high
    )
    gap = inputs.ref_logps - inputs.per_token_logps
    kl = torch.exp(gap) - gap - 1
    loss = aggregate(config.beta * kl - surrogate, mask, config.loss_type, config.max_completion_length, totals)
    selection, selection_clipped = _clipped_surrogate(
        inputs.selection_logps - inputs.old_selection_logps,
        inputs.selection_advantages,
        config.epsilon,
        config.epsilon_high,
    )
    layers = len(selection)
    if layers:
        loss = loss - config.selection_policy.weight * (selection.sum(0).sum() / totals.rows)
    tokens = max(1, totals.tokens)
    metrics = {
        "kl": (kl * mask).sum() / tokens,
        "clip_ratio/region_mean": (clipped.float() * mask).sum() / tokens,
        "clip_ratio/low_mean": ((clipped & (advantages < 0)).float() * mask).sum() / tokens,
        "clip_ratio/high_mean": ((clipped & (advantages > 0)).float() * mask).sum() / tokens,
        "selection_clip_fraction": selection_clipped.float().sum() / max(1, layers * totals.rows),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def aggregate(
    per_token: Tensor, mask: Tensor, loss_type: str, max_completion_length: int, totals: Totals | None = None
) -> Tensor:
    """Mean of (rows, tokens) values: ``grpo`` per answer then over answers, ``dapo`` over all tokens, ``dr_grpo`` over
    answers times the length limit (a constant, so that long answers are not favoured). Of a part of a step with
    ``totals`` its share of that mean."""
    totals = totals or Totals(mask.shape[0], int(mask.sum()))
    if loss_type == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp_min(1)).sum() / totals.rows
    if loss_type == "dapo":
        return (per_token * mask).sum() / max(1, totals.tokens)
    if loss_type == "dr_grpo":
        return (per_token * mask).sum() / (totals.rows * max_completion_length)
    raise ValueError(f"loss_type must be 'grpo', 'dapo' or 'dr_grpo', got {loss_type!r}")


def _clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(ρA, clip(ρ)A) and where the clip holds the gradient back."""
    ratio = torch.exp(log_ratio)
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return torch.minimum(plain, clipped), clipped < plain
