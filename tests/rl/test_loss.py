"""The loss: by hand, and against TRL's own computation on the same tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sparsity_forcing.params import SelectionPolicyParams, TrainParams
from sparsity_forcing.rl.loss import LossInputs, Totals, aggregate, grpo_loss
from sparsity_forcing.rl.metrics import replay_metrics

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
NO_SELECTION = torch.zeros(0, 1)


def params(**changes) -> TrainParams:
    return TrainParams(**{"num_generations": 4, "budgets": (0.9,), "max_completion_length": 7, **changes})


def one_token(log_ratio: float, advantage: float, gap: float = 0.0, **changes) -> tuple[Tensor, dict]:
    """Loss of one rollout of one token with the given log-ratio and distance to the reference."""
    inputs = LossInputs(
        per_token_logps=torch.tensor([[-1.0]]),
        old_logps=torch.tensor([[-1.0 - log_ratio]]),
        ref_logps=torch.tensor([[-1.0 + gap]]),
        completion_mask=torch.tensor([[True]]),
        advantages=torch.tensor([advantage]),
        selection_logps=NO_SELECTION,
        old_selection_logps=NO_SELECTION,
        selection_advantages=NO_SELECTION,
    )
    return grpo_loss(inputs, params(**changes))


def random_inputs(rows: int = 8, tokens: int = 7, layers: int = 2) -> LossInputs:
    """Log-probabilities that have drifted far enough to be clipped on both sides; ragged lengths."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    logps = draw(rows, tokens) - 2
    mask = torch.arange(tokens) < torch.tensor([7, 1, 3, 5, 7, 2, 4, 6])[:rows, None]
    selection = draw(layers, rows)
    return LossInputs(
        per_token_logps=logps.requires_grad_(),
        old_logps=logps.detach() + 0.3 * draw(rows, tokens),
        ref_logps=logps.detach() + 0.5 * draw(rows, tokens),
        completion_mask=mask,
        advantages=draw(rows),
        selection_logps=selection.requires_grad_(),
        old_selection_logps=selection.detach() + 0.3 * draw(layers, rows),
        selection_advantages=draw(layers, rows),
    )


@pytest.mark.parametrize(
    "ratio, advantage, expected, clipped",
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.1, 2.0, -2.2, 0.0),
        (1.5, 2.0, -1.2 * 2, 1.0),  # no reward for going further
        (1.5, -2.0, 3.0, 0.0),  # the way back stays open
        (0.5, -2.0, 0.9 * 2, 1.0),
        (0.5, 2.0, -1.0, 0.0),
    ],
)
def test_the_surrogate_is_clipped_where_it_would_overshoot(ratio, advantage, expected, clipped):
    loss, metrics = one_token(math.log(ratio), advantage, beta=0.0, epsilon=0.1, epsilon_high=0.2)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["clip_ratio/region_mean"]) == clipped


def test_the_kl_term_is_the_k3_estimate():
    loss, metrics = one_token(0.0, 0.0, gap=math.log(2), beta=0.1)
    assert float(metrics["kl"]) == pytest.approx(2 - math.log(2) - 1, rel=1e-5)
    assert float(loss) == pytest.approx(0.1 * (1 - math.log(2)), rel=1e-5)


def test_aggregation_by_hand():
    values = torch.tensor([[1.0, 3.0, 99.0], [4.0, 99.0, 99.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert float(aggregate(values, mask, "grpo", 10)) == (2 + 4) / 2
    assert float(aggregate(values, mask, "dapo", 10)) == pytest.approx(8 / 3)
    assert float(aggregate(values, mask, "dr_grpo", 10)) == pytest.approx(8 / 20)
    with pytest.raises(ValueError, match="loss_type must be 'grpo', 'dapo' or 'dr_grpo', got 'bnpo'"):
        aggregate(values, mask, "bnpo", 10)


def trl_loss(inputs: LossInputs, config: TrainParams) -> tuple[Tensor, dict[str, list[float]]]:
    """The body of TRL's `GRPOTrainer._compute_loss` on given log-probabilities, without a trainer around it."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    rows, tokens = inputs.per_token_logps.shape
    metrics = defaultdict(list)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs.per_token_logps, torch.zeros(rows, tokens), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        loss_type=config.loss_type,
        beta=config.beta,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon_high,
        max_completion_length=config.max_completion_length,
        importance_sampling_level="token",
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": metrics},
    )
    mask = inputs.completion_mask.long()
    batch = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logps,
        "ref_per_token_logps": inputs.ref_logps,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, batch), metrics


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_those_of_trl(loss_type, beta):
    inputs = random_inputs()
    config = params(loss_type=loss_type, beta=beta, epsilon=0.1, epsilon_high=0.25, selection_policy={"weight": 0.0})
    loss, metrics = grpo_loss(inputs, config)
    expected, trl_metrics = trl_loss(inputs, config)
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, inputs.per_token_logps)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)
    assert 0 < float(metrics["clip_ratio/region_mean"]) < 1
    for name in ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert float(metrics[name]) == pytest.approx(trl_metrics[name][0])
        assert float(metrics[name]) > 0
    if beta:
        assert float(metrics["kl"]) == pytest.approx(trl_metrics["kl"][0], rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_is_masked_does_not_count(loss_type):
    inputs = random_inputs()
    config = params(loss_type=loss_type)
    loss = grpo_loss(inputs, config)[0]
    (gradient,) = torch.autograd.grad(loss, inputs.per_token_logps)
    assert (gradient[~inputs.completion_mask] == 0).all()
    changed = inputs.old_logps.masked_fill(~inputs.completion_mask, 3.0)
    other = LossInputs(**{**vars(inputs), "old_logps": changed})
    torch.testing.assert_close(grpo_loss(other, config)[0], loss)


def test_the_selection_term_by_hand():
    inputs = random_inputs()
    with_term, without = (
        params(beta=0.0, epsilon=0.1, epsilon_high=0.2, selection_policy=SelectionPolicyParams(weight=weight))
        for weight in (0.5, 0.0)
    )
    loss, metrics = grpo_loss(inputs, with_term)
    term = loss - grpo_loss(inputs, without)[0]
    layers, rows = inputs.selection_logps.shape
    drift = (inputs.selection_logps - inputs.old_selection_logps).detach()
    expected, slope, clipped = 0.0, torch.zeros(layers, rows), 0
    for layer in range(layers):
        for row in range(rows):
            ratio = float(drift[layer, row].exp())
            advantage = float(inputs.selection_advantages[layer, row])
            bounded = min(max(ratio, 0.9), 1.2)
            expected -= 0.5 * min(ratio * advantage, bounded * advantage) / rows
            if ratio * advantage <= bounded * advantage:
                slope[layer, row] = -0.5 * ratio * advantage / rows
            else:
                clipped += 1
    assert float(term.detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs.selection_logps)[0], slope)
    assert 0 < clipped < layers * rows
    assert float(metrics["selection_clip_fraction"]) == pytest.approx(clipped / (layers * rows))


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not():
    logps = torch.full((4, 3), -1.5, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    still = logps.detach()
    empty = torch.zeros(0, 4)
    mask = torch.ones(4, 3, dtype=torch.bool)
    loss, _ = grpo_loss(LossInputs(logps, still, still, mask, advantages, empty, empty, empty), params())
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-7)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], -advantages[:, None].expand(4, 3) / 12)


def part_of(inputs: LossInputs, rows: slice) -> LossInputs:
    layered = ("selection_logps", "old_selection_logps", "selection_advantages")
    return LossInputs(**{k: v[:, rows] if k in layered else v[rows] for k, v in vars(inputs).items()})


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_parts_of_a_step_add_up_to_it(loss_type, size):
    inputs = random_inputs()
    config = params(loss_type=loss_type)
    whole, metrics = grpo_loss(inputs, config)
    totals = Totals(8, int(inputs.completion_mask.sum()))
    parts = [grpo_loss(part_of(inputs, slice(i, i + size)), config, totals) for i in range(0, 8, size)]
    total = sum(loss for loss, _ in parts)
    torch.testing.assert_close(total, whole)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(found[name] for _, found in parts), value)
    leaves = (inputs.per_token_logps, inputs.selection_logps)
    for found, expected in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(found, expected)


def test_replay_differences_are_reported_with_their_tail():
    metrics = replay_metrics(torch.arange(1000.0).flip(0))
    assert metrics == {
        "replay_max_difference": 999,
        "replay_mean_difference": 499.5,
        "replay_q99_difference": 989,
        "replay_q999_difference": 998,
    }
    assert replay_metrics(torch.zeros(0)) == {}
    assert replay_metrics(torch.ones(1))["replay_q99_difference"] == 1
