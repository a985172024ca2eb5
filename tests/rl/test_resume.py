"""Interrupted training: what goes on from a checkpoint is the run that was never interrupted."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from runs import Recorder, StopAfter, assert_bit_equal, state, timeless, trainer_of

from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.generation import loop
from sparsity_forcing.rl.trainer import TrainingError


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"selection_policy": {"sigma": 0.0}},
        {"selection_policy": {"sigma": 0.8, "final_sigma": 0.1}},
        {"freeze_vision": False},
        {"dtype": torch.bfloat16},
        {"lora": {"r": 4}},
        {"num_iterations": 2, "rollout_prompts": 1, "gradient_checkpointing": True, "logits_chunk": 5},
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(tmp_path, caplog, change):
    straight = trainer_of(tmp_path / "straight", **change)
    history = straight.train()

    interrupted = trainer_of(tmp_path / "resumed", StopAfter(3), **change)
    with pytest.raises(ConnectionAbortedError):
        interrupted.train()
    resumed = trainer_of(tmp_path / "resumed", record := Recorder(), **change)
    torch.manual_seed(99)  # what the process drew before must not matter
    resumed_history = resumed.train()
    assert "resumed from" in caplog.text
    assert "at step 2 of 4" in caplog.text
    assert_bit_equal(state(resumed), state(straight))
    assert timeless(resumed_history) == timeless(history)
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert timeless(record.steps) == timeless(history)  # whole, though two steps were another process's
    assert resumed.seconds > sum(row["seconds"] for row in resumed_history)


def test_a_corrupted_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    straight = trainer_of(tmp_path / "straight", checkpoint_every=1)
    straight.train()
    with pytest.raises(ConnectionAbortedError):
        trainer_of(tmp_path / "resumed", StopAfter(4), checkpoint_every=1).train()
    newest = Checkpoints(tmp_path / "resumed", "abc").latest()[1]
    weights = next(newest.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    resumed = trainer_of(tmp_path / "resumed", checkpoint_every=1)
    resumed.train()
    assert f"{newest} is corrupted" in caplog.text
    assert "at step 2 of 4" in caplog.text
    assert_bit_equal(state(resumed), state(straight))


def test_another_configuration_starts_over_and_says_so(tmp_path, caplog):
    trainer_of(tmp_path, steps=2).train()
    other = trainer_of(tmp_path, identity="def", steps=2)
    assert len(other.train()) == 2
    assert "resumed from" not in caplog.text
    assert f"not resumed: {tmp_path / 'abc'} (step 2) is of another configuration" in caplog.text


def test_asked_to_stop_it_ends_its_step_saves_and_exits(tmp_path):
    def ask(metrics: dict, table) -> None:
        if metrics["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        trainer_of(tmp_path, ask).train()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert Checkpoints(tmp_path, "abc").latest()[0] == 1
    straight, resumed = trainer_of(tmp_path / "straight"), trainer_of(tmp_path)
    straight.train()
    resumed.train()
    assert_bit_equal(state(resumed), state(straight))


@pytest.mark.parametrize("validate_every", [1, 3])
def test_asked_to_stop_while_it_validates_it_goes_on_with_the_validation(tmp_path, monkeypatch, validate_every):
    """A validation may take longer than a stopped process is left alive: it ends at its next batch."""
    changes = {"validate_every": validate_every, "validation_batch_size": 1, "accuracy_guard": 1.0}
    straight = trainer_of(tmp_path / "straight", **changes)
    history = straight.train()
    stopped = trainer_of(tmp_path / "resumed", **changes)
    batches, deployed = [], stopped.sampler.deployed

    def ask(rows):
        if stopped.step == validate_every:
            batches.append(len(rows))
            os.kill(os.getpid(), signal.SIGTERM)
        return deployed(rows)

    monkeypatch.setattr(stopped.sampler, "deployed", ask)
    with pytest.raises(SystemExit) as exit_code:
        stopped.train()
    assert exit_code.value.code == 143
    assert batches == [1]  # of three
    assert Checkpoints(tmp_path / "resumed", "abc").latest()[0] == validate_every
    again = trainer_of(tmp_path / "resumed", **changes)  # stopped once more, when the validation is done
    monkeypatch.setattr(again.sampler, "roll_out", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        again.train()
    assert (
        json.loads((Checkpoints(tmp_path / "resumed", "abc").latest()[1] / "trainer.json").read_text())["unfinished"]
        is None
    )

    resumed = trainer_of(tmp_path / "resumed", record := Recorder(), **changes)
    assert timeless(resumed.train()) == timeless(history)
    assert timeless(record.steps) == timeless(history)
    assert resumed.best == straight.best
    assert_bit_equal(state(resumed), state(straight))


@pytest.mark.parametrize("place", ["roll_out", "reference_logps", "replay"])
def test_asked_to_stop_within_a_step_it_is_the_run_that_was_never_interrupted(tmp_path, monkeypatch, place):
    """The step is dropped: it is not waited for."""
    changes = {"rollout_prompts": 1, "micro_batch_prompts": 1}
    straight = trainer_of(tmp_path / "straight", **changes)
    history = straight.train()
    stopped = trainer_of(tmp_path / "resumed", **changes)
    owner = {"roll_out": stopped.sampler, "reference_logps": stopped.passes, "replay": stopped.updater}[place]
    real, calls = getattr(owner, place), []

    def ask(*args, **kwargs):
        result = real(*args, **kwargs)
        if stopped.step == 2:
            calls.append(result)
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, place, ask)
    if place == "replay":
        ask.train = real.train
    with pytest.raises(SystemExit):
        stopped.train()
    assert len(calls) == 1  # of two
    assert Checkpoints(tmp_path / "resumed", "abc").latest()[0] == 2
    resumed = trainer_of(tmp_path / "resumed", **changes)
    assert timeless(resumed.train()) == timeless(history)
    assert_bit_equal(state(resumed), state(straight))


def test_asked_to_stop_while_it_answers_it_ends_after_a_token(tmp_path, monkeypatch):
    stopped = trainer_of(tmp_path, max_completion_length=400)
    real, drawn = loop.draw, []

    def ask(*args):
        if stopped.step == 1:
            drawn.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, "draw", ask)
    with pytest.raises(SystemExit):
        stopped.train()
    assert drawn == [1]
    assert Checkpoints(tmp_path, "abc").latest()[0] == 1


def test_asked_to_stop_before_the_first_step_it_saves_nothing(tmp_path, monkeypatch, caplog):
    trainer = trainer_of(tmp_path)
    deployed = trainer.sampler.deployed
    monkeypatch.setattr(
        trainer.sampler, "deployed", lambda rows: os.kill(os.getpid(), signal.SIGTERM) or deployed(rows)
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert "there is nothing to save" in caplog.text
    assert Checkpoints(tmp_path, "abc").latest() is None


def test_the_chosen_weights_are_those_of_the_record_after_a_resume(tmp_path):
    """The run was cut off after a better step than any its checkpoint knows of."""
    changes = {"validate_every": 1, "accuracy_guard": 1.0, "checkpoint_every": 2}
    straight = trainer_of(tmp_path / "straight", **changes)
    straight.train()
    with pytest.raises(ConnectionAbortedError):
        trainer_of(tmp_path / "resumed", StopAfter(3), **changes).train()
    resumed = trainer_of(tmp_path / "resumed", **changes)
    resumed.train()
    assert resumed.best == straight.best
    assert_bit_equal(resumed.model.state_dict(), straight.model.state_dict())


def damage_best(directory: Path) -> None:
    for path in directory.glob("abc/best-*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")


def test_damaged_chosen_weights_do_not_stop_a_resumed_run(tmp_path, caplog):
    changes = {"validate_every": 1, "accuracy_guard": 1.0, "checkpoint_every": 2}
    with pytest.raises(ConnectionAbortedError):
        trainer_of(tmp_path, StopAfter(3), **changes).train()
    damage_best(tmp_path)
    resumed = trainer_of(tmp_path, **changes)
    resumed.train()
    assert "are corrupted (weights.safetensors has another checksum" in caplog.text
    assert "chosen among the validated steps to come" in caplog.text
    assert resumed.best["step"] > 2


def test_chosen_weights_damaged_during_the_run_are_named(tmp_path):
    def damage(metrics: dict, table) -> None:
        if metrics["step"] == 4:
            damage_best(tmp_path)

    with pytest.raises(TrainingError, match=r"the chosen weights of step \d are gone or damaged"):
        trainer_of(tmp_path, damage, accuracy_guard=1.0).train()
