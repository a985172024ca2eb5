"""What is known of every rollout of a step, over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from sparsity_forcing.params import TrainParams
from sparsity_forcing.rl.cost import TOKEN_RATIO, CostModel
from sparsity_forcing.rl.rewards import Rewards, group_advantages, joint_rewards
from sparsity_forcing.rl.rollout import Rollouts


@dataclass(frozen=True)
class Facts:
    """(rows,) float32 each, the rollouts of a group next to each other; ``layer_*``: (layers, rows).

    ``prompt``, ``length``: tokens of the prompt and of the answer. ``logps``: sum of the log-probabilities of all
    tokens, one number.
    """

    correct: Tensor
    p: Tensor
    token_ratio: Tensor
    visual_token_ratio: Tensor
    prompt: Tensor
    length: Tensor
    truncated: Tensor
    layer_ratio: Tensor
    layer_visual_ratio: Tensor
    logps: Tensor

    @classmethod
    def gathered(cls, correct: Tensor, rollouts: Sequence[Rollouts], accelerator: Accelerator) -> Facts:
        """Those of all processes, in the order of the step's rows. ``correct``: (rows,) scores of this process."""

        def columns(found: Rollouts) -> Tensor:
            ratios, lengths = (found.token_ratio, found.visual_token_ratio), (found.prompt_length, found.length)
            single = (found.p, *ratios, *lengths, found.truncated)
            return torch.stack([*single, *found.layer_ratio, *found.layer_visual_ratio]).float()

        local = torch.cat([columns(found) for found in rollouts], dim=1)
        local = torch.cat([correct.to(local)[None], local])
        score, p, ratio, visual, prompt, length, truncated, *layers = accelerator.gather(local.T.contiguous()).T
        half = len(layers) // 2
        logps = accelerator.gather(torch.stack([found.logps.sum() for found in rollouts]).sum()[None]).sum()
        layer_ratio, layer_visual_ratio = torch.stack(layers[:half]), torch.stack(layers[half:])
        return cls(score, p, ratio, visual, prompt, length, truncated, layer_ratio, layer_visual_ratio, logps)


@dataclass(frozen=True)
class Credit:
    """``rewards`` and ``advantages``: (queries, group) of all processes; ``group_advantages``: the same before centring
    by budget. ``selection_advantages``: (layers, rows), no layers where selection is deterministic."""

    rewards: Rewards
    group_advantages: Tensor
    advantages: Tensor
    selection_advantages: Tensor


def credit(
    facts: Facts, config: TrainParams, costs: CostModel = TOKEN_RATIO, seed: int = 0, pays_efficiency: bool = True
) -> Credit:
    """Rewards and advantages of all groups of a step; advantages are centred over the groups of all processes.

    ``seed`` decides whose cost a rollout is paid for where `reward.shuffle` asks for that. ``pays_efficiency``: without
    it rewards are correctness alone.
    """
    group, reward = config.num_generations, config.reward
    order = torch.arange(len(facts.p))
    if reward.shuffle:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
    score = facts.correct.unflatten(0, (-1, group))
    weight = reward.weight_efficiency if pays_efficiency else 0.0
    budgets = facts.p.unflatten(0, (-1, group)) if config.center_by_budget else None

    def judged(token_ratio: Tensor) -> tuple[Rewards, Tensor]:
        cost = costs.relative(token_ratio, facts.prompt, facts.length)[order.to(token_ratio.device)]
        gated = reward.gate == "anyone_right"
        rewards = joint_rewards(score, cost.unflatten(0, (-1, group)), weight, gated)
        return rewards, group_advantages(rewards.total, config.scale_rewards, budgets)

    rewards, advantages = judged(facts.token_ratio)
    layers = facts.layer_ratio
    if not config.selection_policy.sigma:
        selection = layers.new_zeros(0, layers.shape[1])
    elif config.selection_policy.credit == "joint":
        selection = advantages.flatten().expand(len(layers), -1)
    else:
        selection = torch.stack([judged(ratio)[1].flatten() for ratio in layers])
        if config.selection_policy.credit == "layer_by_share":
            selection = selection * (layers.mean(1, keepdim=True) / layers.mean())
    return Credit(rewards, group_advantages(rewards.total, config.scale_rewards), advantages, selection)


def counts(facts: Facts, config: TrainParams) -> Tensor:
    """(rows,) bool: the rollouts that the loss counts."""
    counted = torch.ones_like(facts.correct, dtype=torch.bool)
    if config.skip_all_wrong:
        groups = facts.correct.unflatten(0, (-1, config.num_generations)) > 0.5
        counted &= groups.any(1).repeat_interleave(config.num_generations)
    if config.mask_truncated_completions:
        counted &= facts.truncated == 0
    return counted
