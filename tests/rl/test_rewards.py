"""Joint rewards and group advantages, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsity_forcing.rl.rewards import group_advantages, joint_rewards

share = st.floats(0, 1, width=32)
groups = st.lists(st.tuples(st.booleans(), share), min_size=2, max_size=8)


def test_reward_is_correctness_plus_what_was_left_out():
    rewards = joint_rewards(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.25, 0.5, 1.0]]))
    assert rewards.correct.tolist() == [[1.0, 0.0, 1.0]]
    assert rewards.efficiency.tolist() == [[0.75, 0.5, 0.0]]
    assert rewards.total.tolist() == [[1.75, 0.5, 1.0]]


def test_a_group_without_a_right_answer_earns_nothing_for_being_sparse():
    rewards = joint_rewards(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.full((2, 2), 0.25))
    assert rewards.total.tolist() == [[0.0, 0.0], [0.75, 1.75]]
    assert group_advantages(rewards.total)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("score, expected", [(0.5, 0.0), (0.51, 0.75)])
def test_an_answer_is_right_above_one_half(score, expected):
    assert joint_rewards(torch.tensor([[score, 0.0]]), torch.full((1, 2), 0.25)).efficiency[0, 1] == expected


def test_the_efficiency_part_has_a_weight():
    scores, ratios = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.75]])
    assert joint_rewards(scores, ratios, 0.5).total.tolist() == [[1.25, 0.125]]
    assert joint_rewards(scores, ratios, 0.0).total.tolist() == [[1.0, 0.0]]


@given(groups)
def test_a_right_answer_outranks_every_wrong_one_of_its_group(group):
    correct = torch.tensor([[float(right) for right, _ in group]])
    ratio = torch.tensor([[max(tau, 1e-3) for _, tau in group]])  # something is always kept
    total, right = joint_rewards(correct, ratio).total[0], correct[0] == 1
    if right.any() and not right.all():
        assert total[right].min() > total[~right].max()


@given(groups)
def test_advantages_of_a_group_sum_to_zero_and_follow_its_rewards(group):
    correct = torch.tensor([[float(right) for right, _ in group]])
    total = joint_rewards(correct, torch.tensor([[tau for _, tau in group]])).total
    for scale in ("group", "batch", "none"):
        advantages = group_advantages(total, scale)
        rounding = 1.2e-7 / 1e-4  # of a mean of equal rewards, over the least deviation that is divided by
        assert abs(float(advantages.mean())) < 1.1 * rounding
        order = total[0].argsort(stable=True)
        assert (advantages[0][order].diff() >= 0).all()


def test_scales():
    rewards = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    centred = torch.tensor([[-1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(group_advantages(rewards, "none"), centred)
    by_group = group_advantages(rewards, "group")
    torch.testing.assert_close(by_group, centred / (2**0.5 + 1e-4))  # standard deviation of 0 and 2 is sqrt(2)
    by_batch = group_advantages(rewards, "batch")
    torch.testing.assert_close(by_batch, centred / ((2 / 3) ** 0.5 + 1e-4))
    with pytest.raises(ValueError, match="scale must be"):
        group_advantages(rewards, "std")


def test_advantages_are_centred_by_budget_over_the_batch():
    rewards = torch.tensor([[3.0, 1.0], [2.0, 0.0]])  # the first budget always earns two more
    budgets = torch.tensor([[0.9, 0.95], [0.9, 0.95]])
    assert group_advantages(rewards, "none", budgets).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    rewards = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
    assert group_advantages(rewards, "none", budgets).tolist() == [[0.5, -0.5], [-0.5, 0.5]]


def test_a_budget_is_found_wherever_it_stands_in_its_group():
    rewards = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    budgets = torch.tensor([[0.9, 0.95, 0.9], [0.95, 0.9, 0.9]])
    advantages = group_advantages(rewards, "none", budgets)
    for budget in (0.9, 0.95):
        assert float(advantages[budgets == torch.tensor(budget)].mean()) == pytest.approx(0, abs=1e-6)


def test_of_groups_of_two_nothing_is_left_where_the_same_budget_always_wins():
    """Divided by its own deviation a group of two has one difference, whatever its rewards; of larger ones it stays."""
    budgets = torch.tensor([0.94, 0.975]).expand(4, 2)
    rewards = 1 + torch.tensor([[0.1, 0.05], [0.6, 0.1], [0.9, 0.2], [0.3, 0.2]])
    assert group_advantages(rewards, "group", budgets).abs().max() < 1e-2
    assert group_advantages(rewards, "none", budgets).abs().max() > 0.1
    of_four = torch.cat([rewards, rewards.flip(0)], dim=1)
    assert group_advantages(of_four, "group", budgets.repeat(1, 2)).abs().max() > 0.1


def test_one_group_alone_is_not_centred_by_budget():
    budgets = torch.tensor([[0.9, 0.95]])
    assert group_advantages(torch.tensor([[2.0, 0.0]]), "none", budgets).tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(
    "correct, ratio, message",
    [
        ([[0.0, 1.0]], [[0.5]], r"two \(queries, group\) tensors, got \(1, 2\) and \(1, 1\)"),
        ([0.0, 1.0], [0.5, 0.5], r"two \(queries, group\) tensors"),
        ([[0.0, 1.5]], [[0.5, 0.5]], "scores must be in 0-1"),
        ([[0.0, float("nan")]], [[0.5, 0.5]], "scores must be in 0-1 and not NaN"),
    ],
)
def test_what_is_no_score_is_refused(correct, ratio, message):
    with pytest.raises(ValueError, match=message):
        joint_rewards(torch.tensor(correct), torch.tensor(ratio))
