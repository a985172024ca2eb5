"""Why selection is a stochastic action: the literal objective cannot reach the attention through its efficiency part.

The ratio of a rollout depends on prompt, budget and weights, not on the answer, and the expected policy gradient of a
reward that does not depend on the answer is zero. The expectation is taken exactly, over every one-token answer.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scenes import gradients, prompts_of, replayed, rollouts_of, suppressed
from tiny_prompts import question

from sparsity_forcing.params import SparsityParams
from sparsity_forcing.rl.rewards import group_advantages, joint_rewards

SETTINGS = SparsityParams()


@pytest.fixture
def every_answer(policy):
    """Model, prompts and one rollout per possible one-token answer, all at one budget."""
    model, processor = policy
    prompts = prompts_of(model, processor, [question(4)], SETTINGS)
    everything = torch.arange(model.config.text_config.vocab_size)
    vocabulary = everything[~torch.isin(everything, suppressed(model))]
    group = len(vocabulary)
    rollouts = rollouts_of(model, prompts, torch.full((group,), 0.7), group, SETTINGS, tokens=1)
    answers = replace(rollouts, completions=vocabulary[:, None], completion_mask=torch.ones(group, 1, dtype=torch.bool))
    return model, prompts, answers, group


def expected_gradient(every_answer, correct: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Exact expectation of reward · ∇ log π(answer), all parameters in one vector."""
    model, prompts, rollouts, group = every_answer
    logps, _ = replayed(model, prompts, rollouts, group, SETTINGS)
    probabilities = logps.detach().exp()[:, 0]
    torch.testing.assert_close(probabilities.sum(), torch.ones((), dtype=torch.float64))
    rewards = joint_rewards(correct[None], ratio[None]).total[0].double()
    found = gradients(model, (probabilities * rewards * logps[:, 0]).sum())
    return torch.cat([value.flatten() for value in found.values()])


def test_the_efficiency_part_alone_has_no_expected_gradient(every_answer):
    ratio = every_answer[2].token_ratio
    assert ratio.unique().numel() == 1
    right = torch.zeros(len(ratio))
    right[7] = 1.0
    accuracy = expected_gradient(every_answer, right, torch.ones_like(ratio))
    both = expected_gradient(every_answer, right, ratio)
    assert accuracy.norm() > 1e-6
    assert (both - accuracy).norm() < 1e-5 * accuracy.norm()


def test_a_sampled_selection_gives_it_one(policy):
    """At one budget and with every answer equally right, sparser draws are made likelier."""
    model, processor = policy
    prompts = prompts_of(model, processor, [question(6)], SETTINGS)
    rollouts = rollouts_of(model, prompts, torch.full((8,), 0.7), 8, SETTINGS, sigma=0.5, tokens=1)
    rewards = joint_rewards(torch.ones(1, 8), rollouts.token_ratio[None])
    advantages = group_advantages(rewards.total)[0]
    assert advantages.std() > 0.5
    _, density = replayed(model, prompts, rollouts, 8, SETTINGS)
    found = gradients(model, (density * advantages).sum())
    assert found["model.language_model.layers.0.self_attn.k_proj.weight"].norm() > 1e-3
