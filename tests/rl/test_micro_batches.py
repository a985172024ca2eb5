"""How a step is divided over passes is a matter of memory: its gradient is the same."""

from __future__ import annotations

import pytest
import torch
from runs import rows, trainer_of
from scenes import assert_same

import sparsity_forcing.rl.update as update_module
from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.data.schema import Row
from sparsity_forcing.params import SparsityParams

TEXT = Row("text", "train", "say", "how many digits are red?", "4", [])
# Other lengths, two images, no image: a micro-batch of its own must keep the slots that its rollouts had.
MIXED = [TEXT, *rows("train", 2), Row("two", "train", "say", "and these?", "7", rows("train", 2)[0].images * 2)]


def gradients_of_a_step(directory, monkeypatch, train, sparsity, **changes) -> tuple[dict, dict]:
    """Gradients by parameter, and metrics, of a step over four questions."""
    changes = {"prompts_per_step": 4, "reward": {"correct": "scenes:always_right"}, **changes}
    trainer = trainer_of(directory, train=train, sparsity=sparsity, dtype=torch.float64, **changes)
    found = {}

    def keep(step: int) -> float:
        found.update({name: value.grad.clone() for name, value in trainer._trained().items()})
        trainer.updater.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(trainer.updater, "take_step", keep)
    with decoder_attention(trainer.model), decoder_attention(trainer.reference):
        trainer._start = {}
        trainer._one_step()
    return found, trainer.history[0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path, monkeypatch, loss_type, freeze_vision):
    scene = {"loss_type": loss_type, "freeze_vision": freeze_vision}
    sparsity = SparsityParams(p=0.8)
    whole, expected = gradients_of_a_step(tmp_path / "whole", monkeypatch, MIXED, sparsity, **scene)
    assert expected["selection_clip_fraction"] == 0
    for size in (1, 2, 3):
        parts, metrics = gradients_of_a_step(
            tmp_path / f"{size}", monkeypatch, MIXED, sparsity, micro_batch_prompts=size, **scene
        )
        assert_same(parts, whole)
        for name in ("loss", "kl", "entropy", "reward", "replay_mean_difference", "prompt_tokens"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("sparsity", [SparsityParams(p=0.8, prefill="sparse"), SparsityParams(scoring_rows="probe")])
def test_nor_where_rollouts_share_no_prefix(tmp_path, monkeypatch, sparsity):
    whole, _ = gradients_of_a_step(tmp_path / "whole", monkeypatch, MIXED, sparsity)
    parts, _ = gradients_of_a_step(tmp_path / "parts", monkeypatch, MIXED, sparsity, micro_batch_prompts=1)
    assert_same(parts, whole)


def test_rollouts_in_portions_are_judged_together(tmp_path, monkeypatch):
    seen = []
    loss = update_module.grpo_loss
    monkeypatch.setattr(update_module, "grpo_loss", lambda *inputs: seen.append(inputs[0].advantages) or loss(*inputs))
    changes = {"rollout_prompts": 1, "micro_batch_prompts": 1}
    _, metrics = gradients_of_a_step(tmp_path, monkeypatch, MIXED, SparsityParams(p=0.8), **changes)
    assert metrics["rollouts"] == 16
    advantages = torch.stack(seen)  # (portions, rollouts of one question): budgets 0.6, 0.9, 0.6, 0.9
    for budget in (0, 1):  # centred over all groups of the step, not over those of a portion
        assert advantages[:, budget::2].mean().abs() < 1e-6
        assert advantages[:, budget::2].mean(1).abs().max() > 1e-3
    assert metrics["replay_max_difference"] < 1e-12


@pytest.mark.parametrize("prefill", ["suffix", "sparse", "dense"])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_prompts": 1}, {"rollout_prompts": 2, "micro_batch_prompts": 1}])
def test_a_frozen_tower_sees_an_image_once_a_step(tmp_path, prefill, changes):
    """Whatever the rollouts share, and however often the update goes through them."""
    sparsity, images = SparsityParams(p=0.8, prefill=prefill), sum(len(row.images) for row in MIXED)
    changes = {"prompts_per_step": 4, "num_iterations": 2, "gradient_checkpointing": True, **changes}
    trainer = trainer_of(tmp_path, train=MIXED, sparsity=sparsity, **changes)
    seen = []
    for model in (trainer.model, trainer.reference):
        look = lambda tower, inputs, named, found: seen.append(len(named["grid_thw"]))  # noqa: E731
        model.model.visual.register_forward_hook(look, with_kwargs=True)
    with decoder_attention(trainer.model), decoder_attention(trainer.reference):
        trainer.learn(MIXED)
    assert sum(seen) == images == 4
