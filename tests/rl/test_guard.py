"""Which validated step becomes the policy, and when the accuracy guard ends the training."""

from __future__ import annotations

import torch
from runs import trainer_of

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.rl.trainer import Trainer


def test_the_policy_is_the_sparsest_validated_step_within_the_guard(tmp_path):
    trainer = trainer_of(tmp_path / "whole", validate_every=1, accuracy_guard=1.0)
    history = trainer.train()
    ratios = [row["validation_token_ratio"] for row in history]
    assert len(set(ratios)) > 1, "every step kept the same share: nothing to choose between"
    best = 1 + ratios.index(min(ratios))
    assert trainer.best["step"] == best
    assert trainer.best["token_ratio"] == min(ratios)

    shorter = trainer_of(tmp_path / "part", validate_every=1, accuracy_guard=1.0)
    while shorter.step < best:  # the same run, stopped at the chosen step
        with_attention(shorter)
    for name, value in shorter.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def with_attention(trainer: Trainer) -> None:
    with decoder_attention(trainer.model), decoder_attention(trainer.reference):
        if trainer.step == 0:
            trainer._start = {f"start_{name}": value for name, value in trainer.validate().items()}
        trainer._one_step()


def test_no_step_within_the_guard_is_said_and_the_last_step_is_kept(tmp_path, caplog, monkeypatch):
    trainer = trainer_of(tmp_path, accuracy_guard=0.0)
    monkeypatch.setattr(trainer, "validate", falling_accuracy())
    trainer.train()
    assert trainer.best is None
    assert "no validated step kept its accuracy within train.accuracy_guard (0)" in caplog.text


def test_validations_below_the_guard_end_the_training(tmp_path, caplog, monkeypatch):
    trainer = trainer_of(tmp_path, accuracy_guard=0.0, validate_every=1, checkpoint_every=2, stop_below_guard=2)
    monkeypatch.setattr(trainer, "validate", falling_accuracy())
    assert [row["step"] for row in trainer.train()] == [1, 2]
    assert "stopped early at step 2: 2 validations in a row fell below train.accuracy_guard (0)" in caplog.text
    again = trainer_of(tmp_path, accuracy_guard=0.0, validate_every=1, stop_below_guard=2)
    assert len(again.train()) == 2  # started again it does not go on


def test_one_validation_above_the_guard_starts_the_count_anew(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, accuracy_guard=0.0, validate_every=1, stop_below_guard=2)
    accuracy = iter([0.5, 0.4, 0.6, 0.4, 0.4])
    ratios = {"token_ratio": 0.5, "visual_token_ratio": 0.5}
    monkeypatch.setattr(trainer, "validate", lambda: {"accuracy": next(accuracy), **ratios})
    assert len(trainer.train()) == 4


def test_where_the_target_was_reached_the_most_accurate_step_within_the_guard_is_the_policy(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, accuracy_guard=0.1, validate_every=1, steps=5)
    found = [(0.9, 0.95), (0.9, 0.3), (0.85, 0.24), (0.88, 0.26), (0.88, 0.25), (0.7, 0.1)]
    validations(monkeypatch, trainer, found)
    monkeypatch.setattr(Trainer, "_reached_target", property(lambda trainer: trainer.step > 1))
    trainer.train()
    assert trainer.best == {
        "step": 4,
        "reached_target": True,
        "accuracy": 0.88,
        "token_ratio": 0.25,
        "visual_token_ratio": 0.25,
    }


def test_above_the_target_the_sparsest_step_within_the_guard_is_the_policy(tmp_path, monkeypatch):
    options = {"accuracy_guard": 0.1, "validate_every": 1, "steps": 3, "reward": {"target_ratio": 0.0}}
    trainer = trainer_of(tmp_path, **options)
    validations(monkeypatch, trainer, [(0.9, 0.95), (0.9, 0.5), (0.85, 0.4), (0.7, 0.2)])
    trainer.train()
    assert trainer.best["step"] == 2


def test_efficiency_is_paid_while_the_rollouts_keep_more_than_the_target(tmp_path):
    """At the budget nearest to the deployed one, 0.9: on average over the last ten steps."""
    options = {"steps": 4, "reward": {"correct": "scenes:always_right"}}
    kept = [row["p0.9/visual_token_ratio"] for row in trainer_of(tmp_path / "free", **options).train()]
    means = [sum(kept[:steps]) / steps for steps in (1, 2, 3)]
    options["reward"]["target_ratio"] = target = sorted(means)[1]  # reached in one or two of the three
    rows = trainer_of(tmp_path / "aimed", **options).train()
    kept = [row["p0.9/visual_token_ratio"] for row in rows]
    means = [sum(kept[:steps]) / steps for steps in (1, 2, 3)]
    paid = [row["reward_efficiency"] > 0 for row in rows]
    assert paid == [True, *(mean > target for mean in means)]
    assert not all(paid)


def validations(monkeypatch, trainer: Trainer, found: list[tuple[float, float]]) -> None:
    """Accuracy and ratio of the start and of every validation."""
    answers = iter(found)

    def validate() -> dict:
        accuracy, ratio = next(answers)
        return {"accuracy": accuracy, "token_ratio": ratio, "visual_token_ratio": ratio}

    monkeypatch.setattr(trainer, "validate", validate)


def falling_accuracy():
    accuracy = iter([0.9, 0.8, 0.7])
    return lambda: {"accuracy": next(accuracy), "token_ratio": 0.5, "visual_token_ratio": 0.5}
