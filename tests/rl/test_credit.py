"""Credit over a whole step, which rollouts count, and the paper's literal objective as parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from sparsity_forcing.params import TrainParams, load_params
from sparsity_forcing.rl.cost import CostModel, cost_model
from sparsity_forcing.rl.facts import Facts, counts, credit

ROOT = Path(__file__).parents[2]
LITERAL = {"selection_policy": {"sigma": 0.0}, "center_by_budget": False}


def facts(correct: list[float], ratio: list[float], truncated: list[bool] | None = None) -> Facts:
    """Two groups of two rollouts, budgets 0.9 and 0.95, two layers."""
    score, token_ratio = torch.tensor(correct), torch.tensor(ratio)
    cut = torch.tensor(truncated or [False] * 4).float()
    layers = torch.stack([token_ratio - 0.1, token_ratio + 0.1])
    p = torch.tensor([0.9, 0.95] * 2)
    prompt, length = torch.tensor([10.0, 20.0, 10.0, 20.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    return Facts(score, p, token_ratio, token_ratio, prompt, length, cut, layers, layers, torch.tensor(-1.0))


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


def test_a_wrong_group_is_paid_only_where_the_gate_is_off():
    scene = facts([0, 0, 1, 0], [0.5, 0.6, 0.7, 0.8])
    paid = credit(scene, params()).rewards.efficiency
    torch.testing.assert_close(paid, torch.tensor([[0.0, 0.0], [0.3, 0.2]]))
    paid = credit(scene, params(reward={"gate": "always"})).rewards.efficiency
    torch.testing.assert_close(paid, torch.tensor([[0.5, 0.4], [0.3, 0.2]]))


def test_where_efficiency_is_not_paid_an_all_right_group_has_no_advantage():
    found = credit(facts([1, 1, 1, 0], [0.5, 0.6, 0.7, 0.8]), params(center_by_budget=False), pays_efficiency=False)
    assert not found.rewards.efficiency.any()
    assert not found.advantages[0].any()
    assert not found.selection_advantages[:, :2].any()
    assert found.selection_advantages[:, 2:].all()


def test_shuffled_every_rollout_is_paid_for_another_ones_cost():
    scene, shuffled = facts([1] * 4, [0.5, 0.6, 0.7, 0.8]), params(reward={"shuffle": True})
    drawn = {tuple(credit(scene, shuffled, seed=seed).rewards.efficiency.flatten().tolist()) for seed in range(20)}
    own = tuple(credit(scene, params()).rewards.efficiency.flatten().tolist())
    assert {tuple(sorted(paid)) for paid in drawn} == {tuple(sorted(own))}
    assert len(drawn) > 5
    first, again = (credit(scene, shuffled, seed=3) for _ in range(2))
    assert torch.equal(first.selection_advantages, again.selection_advantages)


def test_costs_by_hand():
    scene = facts([1] * 4, [0.5, 0.6, 0.7, 0.8])
    cache = credit(scene, params(), CostModel("cache_bytes")).rewards.efficiency.flatten()
    expected = [1 - (5 + 1) / 11, 1 - (12 + 2) / 22, 1 - (7 + 3) / 13, 1 - (16 + 4) / 24]
    torch.testing.assert_close(cache, torch.tensor(expected))
    latency = credit(scene, params(), CostModel("latency", 100.0)).rewards.efficiency.flatten()
    expected = [1 - 106 / 111, 1 - 114 / 122, 1 - 110 / 113, 1 - 120 / 124]
    torch.testing.assert_close(latency, torch.tensor(expected))


def test_a_layer_is_paid_for_its_own_part_of_the_cost():
    scene = facts([1] * 4, [0.5, 0.6, 0.7, 0.8])
    found = credit(scene, params(), CostModel("cache_bytes"))
    lower = replace(scene, token_ratio=scene.layer_ratio[0])
    torch.testing.assert_close(
        found.selection_advantages[0], credit(lower, params(), CostModel("cache_bytes")).advantages.flatten()
    )


def test_by_share_a_layer_is_pushed_for_what_it_keeps_beside_the_others():
    scene = facts([1, 0, 1, 1], [0.5, 0.6, 0.7, 0.8])  # layers keep 0.55 and 0.75, on average 0.65
    by_share = {"credit": "layer_by_share"}
    plain, found = (credit(scene, params(selection_policy=policy)) for policy in ({}, by_share))
    share = torch.tensor([[0.55], [0.75]]) / 0.65
    torch.testing.assert_close(found.selection_advantages, plain.selection_advantages * share)
    assert torch.equal(found.advantages, plain.advantages)


def test_the_weights_of_a_decode_step_are_those_it_reads(tiny):
    model, _ = tiny
    config = model.config.text_config
    linear = [m for m in model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    read = sum(m.weight.numel() + (0 if m.bias is None else m.bias.numel()) for m in linear)
    read += (2 * config.num_hidden_layers + 1) * config.hidden_size  # the norms
    read += config.vocab_size * config.hidden_size  # the head; of the embedding one row is read
    entry = (
        2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    )
    assert cost_model(model, "latency", 4).weights == pytest.approx(read / entry / 4, rel=1e-6)
    assert cost_model(model, "cache_bytes", 4).weights == 0


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
