"""The joint reward r = correct + C · (1 − cost) of a group of rollouts; the cost is τ unless another is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STD_EPSILON = 1e-4  # added to a deviation that rewards are divided by


@dataclass(frozen=True)
class Rewards:
    """(queries, group) float32 each: ``total`` = ``correct`` + ``efficiency``."""

    correct: Tensor
    efficiency: Tensor

    @property
    def total(self) -> Tensor:
        return self.correct + self.efficiency


def joint_rewards(correct: Tensor, cost: Tensor, weight_efficiency: float = 1.0, gated: bool = True) -> Rewards:
    """Joint reward of every rollout (Sparsity Forcing, arXiv 2504.18579).

    Args:
        correct: (queries, group) scores in 0-1.
        cost: (queries, group) in 0-1, the token ratio τ of the paper.
        weight_efficiency: factor of the efficiency part; 0 trains on correctness alone.
        gated: with C; without it a wrong group is paid too.

    Returns:
        C is 1 for a group in which any rollout scored above one half, else 0: an all-wrong group earns nothing for
        being sparse.

    Raises:
        ValueError: shapes differ, or a score is not in 0-1.
    """
    if correct.shape != cost.shape or correct.ndim != 2:
        raise ValueError(f"want two (queries, group) tensors, got {tuple(correct.shape)} and {tuple(cost.shape)}")
    if not bool(((correct >= 0) & (correct <= 1)).all()):
        raise ValueError("scores must be in 0-1 and not NaN")
    efficiency = weight_efficiency * (1 - cost.float())
    if gated:
        efficiency = efficiency * (correct > 0.5).any(dim=1, keepdim=True)
    return Rewards(correct.float(), efficiency)


def group_advantages(rewards: Tensor, scale: str = "group", budgets: Tensor | None = None) -> Tensor:
    """Advantage of every rollout: its reward minus the group's mean, scaled, and centred by budget.

    Args:
        rewards: (queries, group).
        scale: divide by the standard deviation of the ``group`` (GRPO), of the whole ``batch``, or ``none``.
        budgets: (queries, group) budgets; where given, the mean advantage of each budget over the batch is subtracted,
            so that a rollout is compared with others of its budget and not paid for having drawn a low one.

    Returns:
        (queries, group) float32.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)
    elif scale == "batch":
        advantages = advantages / (rewards.std() + STD_EPSILON)
    elif scale != "none":
        raise ValueError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")
    if budgets is not None and rewards.shape[0] > 1:
        for budget in torch.unique(budgets):
            rows = budgets == budget
            advantages = torch.where(rows, advantages - advantages[rows].mean(), advantages)
    return advantages
