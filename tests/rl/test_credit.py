"""Credit over a whole step, which rollouts count, and the paper's literal objective as parameters."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from sparsity_forcing.params import TrainParams, load_params
from sparsity_forcing.rl.facts import Facts, counts, credit

ROOT = Path(__file__).parents[2]
LITERAL = {"selection_policy": {"sigma": 0.0}, "center_by_budget": False}


def facts(correct: list[float], ratio: list[float], truncated: list[bool] | None = None) -> Facts:
    """Two groups of two rollouts, budgets 0.9 and 0.95, two layers."""
    score, token_ratio = torch.tensor(correct), torch.tensor(ratio)
    cut = torch.tensor(truncated or [False] * 4).float()
    layers = torch.stack([token_ratio - 0.1, token_ratio + 0.1])
    p = torch.tensor([0.9, 0.95] * 2)
    return Facts(score, p, token_ratio, token_ratio, torch.ones(4), cut, layers, layers, torch.tensor(-1.0))


def params(**changes) -> TrainParams:
    return TrainParams(num_generations=2, budgets=(0.9, 0.95), **changes)


def test_the_literal_objective_is_the_formula_of_the_paper():
    found = credit(facts([1, 0, 1, 1], [0.5, 0.6, 0.7, 0.8]), params(**LITERAL))
    reward = torch.tensor([[1.5, 0.4], [1.3, 1.2]])  # correct + C (1 - tau)
    torch.testing.assert_close(found.rewards.total, reward)
    expected = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(found.advantages, expected)
    assert found.selection_advantages.shape == (0, 4)


def test_sigma_alone_is_not_the_literal_objective():
    still_centred = params(selection_policy={"sigma": 0.0})
    scene = facts([1, 0, 1, 1], [0.5, 0.6, 0.7, 0.8])
    assert not torch.equal(credit(scene, still_centred).advantages, credit(scene, params(**LITERAL)).advantages)


def test_all_rollouts_count_unless_asked_otherwise():
    scene = facts([0, 0, 1, 0], [0.5] * 4, [True, False, True, False])
    assert counts(scene, params()).tolist() == [True] * 4
    assert counts(scene, params(skip_all_wrong=True)).tolist() == [False, False, True, True]
    assert counts(scene, params(mask_truncated_completions=True)).tolist() == [False, True, False, True]


def test_the_large_preset_says_what_is_not_in_the_paper():
    """Every addition that is on is named in the file, beside the three keys that turn them off."""
    path = ROOT / "presets/qwen2.5-vl-7b.yaml"
    train, text = load_params(path).train, path.read_text()
    given = yaml.safe_load(text)["train"]
    assert train.selection_policy.sigma > 0
    assert train.center_by_budget
    assert given["selection_policy"]["sigma"] == train.selection_policy.sigma
    assert given["center_by_budget"] is True
    assert "not in the paper" in text
