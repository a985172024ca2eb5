"""The trainer: exact resume, skipped steps, what it logs and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_prompts import sharp_model

import sparsity_forcing.rl.sampler as sampler_module
import sparsity_forcing.rl.trainer as trainer_module
import sparsity_forcing.rl.update as update_module
from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import Row
from sparsity_forcing.params import DigitsParams, SparsityParams, TrainParams
from sparsity_forcing.rl.rewards import group_advantages, joint_rewards
from sparsity_forcing.rl.trainer import Trainer, TrainingError

SPARSITY = SparsityParams(p=0.8)
CONFIG = {
    "steps": 4,
    "prompts_per_step": 2,
    "num_generations": 4,
    "budgets": (0.6, 0.9),
    "max_completion_length": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "checkpoint_every": 2,
    "validate_every": 2,
    "validation_rows": 3,
    "log_samples_every": 2,
}


def rows(split: str, count: int) -> list[Row]:
    return [digits_row(DigitsParams(grids=(4, 5)), 0, split, place) for place in range(count)]


class Recorder:
    """Keeps what the trainer reports."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.tables: list[list[dict]] = []

    def __call__(self, metrics: dict, table: list[dict] | None) -> None:
        self.steps.append(metrics)
        self.tables += [] if table is None else [table]


def trainer_of(
    directory: Path, recorder=None, train=None, sparsity=SPARSITY, identity="abc", dtype=torch.float32, **changes
) -> Trainer:
    model, processor = sharp_model(dtype=dtype)
    config = TrainParams(**{**CONFIG, **changes})
    checkpoints = Checkpoints(directory, identity)
    train = rows("train", 6) if train is None else train
    report = recorder or Recorder()
    return Trainer(model, processor, train, rows("validation", 4), config, sparsity, 3, checkpoints, report)


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and optimizer moments."""
    named = {f"model.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    for index, moments in trainer.optimizer.state_dict()["state"].items():
        named |= {f"optimizer.{index}.{name}": torch.as_tensor(value).clone() for name, value in moments.items()}
    return named


def assert_bit_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def timeless(history: list[dict]) -> list[dict]:
    """The history without what a clock says."""
    clocks = ("seconds", "per_second")
    return [{name: v for name, v in row.items() if not any(clock in name for clock in clocks)} for row in history]


class StopAfter(Recorder):
    """Ends the process' training after a step, as a power cut would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def __call__(self, metrics: dict, table: list[dict] | None) -> None:
        super().__call__(metrics, table)
        if metrics["step"] == self.step:
            raise ConnectionAbortedError


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"selection_policy": {"sigma": 0.0}},
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
    resumed = trainer_of(tmp_path / "resumed", **change)
    torch.manual_seed(99)  # what the process drew before must not matter
    resumed_history = resumed.train()
    assert "resumed from" in caplog.text
    assert "at step 2 of 4" in caplog.text
    assert_bit_equal(state(resumed), state(straight))
    assert timeless(resumed_history) == timeless(history)
    assert [row["step"] for row in history] == [1, 2, 3, 4]


def test_training_moves_all_trained_weights_and_no_others(tmp_path):
    trainer = trainer_of(tmp_path, steps=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    reference = {name: value.clone() for name, value in trainer.reference.state_dict().items()}
    trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("model.visual."), name
    assert_bit_equal(trainer.reference.state_dict(), reference)


def test_the_vision_tower_learns_where_it_is_not_frozen(tmp_path):
    trainer = trainer_of(tmp_path, steps=2, freeze_vision=False)
    before = trainer.model.model.visual.patch_embed.proj.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.model.visual.patch_embed.proj.weight, before)


def test_the_model_is_plain_again_after_training(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    trainer.train()
    assert trainer.model.config.text_config._attn_implementation == "sdpa"
    interrupted = trainer_of(tmp_path / "other", StopAfter(1))
    with pytest.raises(ConnectionAbortedError):
        interrupted.train()
    assert interrupted.model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "sparsity", [SPARSITY, SparsityParams(p=0.8, prefill="sparse"), SparsityParams(p=0.8, prefill="dense")]
)
def test_on_policy_the_replay_agrees_and_the_metrics_are_whole(tmp_path, sparsity):
    recorder = Recorder()
    trainer_of(tmp_path, recorder, sparsity=sparsity, steps=2).train()
    for row in recorder.steps:
        assert row["replay_max_difference"] < 1e-5
        assert row["clip_fraction"] == 0
        assert row["rollouts"] == 8
        assert 8 <= row["new_tokens"] <= 32
        assert 0 < row["visual_token_ratio"] < row["token_ratio"] < 1
        assert row["p0.600/visual_token_ratio"] < row["p0.900/visual_token_ratio"]
        assert row["grad_norm"] > 0
        assert all(math.isfinite(value) for value in row.values())
    assert recorder.steps[0]["kl"] != recorder.steps[1]["kl"]
    for name in ("accuracy", "token_ratio", "visual_token_ratio"):
        assert f"start_{name}" in recorder.steps[0]
        assert f"validation_{name}" in recorder.steps[1]


def test_samples_hold_what_was_asked_answered_kept_and_earned(tmp_path):
    recorder = Recorder()
    trainer_of(tmp_path, recorder, steps=2).train()
    (table,) = recorder.tables
    assert len(table) == 8
    assert [record["p"] for record in table] == [0.6, 0.9] * 4
    for record in table:
        assert record["image"].startswith(b"\x89PNG")
        assert record["question"].endswith("?")
        assert 0 < record["visual_token_ratio"] <= 1


def test_every_rollout_is_scored_by_the_answer_to_its_own_question(tmp_path):
    recorder = Recorder()
    train = [replace(row, answer=answer) for row, answer in zip(rows("train", 2), "73", strict=True)]
    trainer = trainer_of(tmp_path, recorder, train=train, steps=1, reward={"correct": "scenes:wants_seven"})
    seven = torch.tensor(trainer.processor.tokenizer.convert_tokens_to_ids(["7"]))
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, seven, 100.0))
    trainer.train()
    (table,) = recorder.tables
    assert {record["completion"] for record in table} == {"7777"}
    assert [record["reward_correct"] for record in table] == [float(record["answer"] == "7") for record in table]
    assert [record["reward_efficiency"] > 0 for record in table] == [record["answer"] == "7" for record in table]


@pytest.mark.parametrize("credit", ["layer", "joint"])
def test_selection_is_judged_by_the_ratio_it_is_said_to_be(tmp_path, monkeypatch, credit):
    seen = {}
    _watch(monkeypatch, seen, sampler_module, "roll_out")
    _watch(monkeypatch, seen, update_module, "grpo_loss")
    config = {"steps": 1, "reward": {"correct": "scenes:always_right"}, "selection_policy": {"credit": credit}}
    trainer_of(tmp_path, **config).train()
    rollouts, inputs = seen["roll_out"][1], seen["grpo_loss"][0][0]  # roll_out: start validation, then the step
    correct, budgets = torch.ones(2, 4), torch.tensor([[0.6, 0.9, 0.6, 0.9]] * 2)

    def expected(ratio: torch.Tensor) -> torch.Tensor:
        return group_advantages(joint_rewards(correct, ratio.view(2, 4)).total, "group", budgets).flatten()

    torch.testing.assert_close(inputs.advantages, expected(rollouts.token_ratio))
    judged_by = rollouts.layer_ratio if credit == "layer" else rollouts.token_ratio.expand(2, -1)
    torch.testing.assert_close(inputs.selection_advantages, torch.stack([expected(ratio) for ratio in judged_by]))


def _watch(monkeypatch, seen: dict, module, name: str) -> None:
    """Keeps the results of ``roll_out`` and the arguments of ``grpo_loss``."""
    real = getattr(module, name)

    def watched(*args, **kwargs):
        result = real(*args, **kwargs)
        seen.setdefault(name, []).append(result if name == "roll_out" else args)
        return result

    monkeypatch.setattr(module, name, watched)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_skipped_and_counted(tmp_path, caplog, poison):
    trainer = trainer_of(tmp_path)
    weight = trainer.model.model.language_model.layers[0].self_attn.q_proj.weight
    backwards = []

    def poisoned_once(gradient):
        backwards.append(None)
        return gradient * poison if len(backwards) == 2 else gradient

    weight.register_hook(poisoned_once)
    history = trainer.train()
    assert [row["skipped_steps"] for row in history] == [0, 1, 1, 1]
    assert "the step is skipped" in caplog.text
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert ["grad_norm" in row for row in history] == [True, False, True, True]


def test_a_skipped_step_changes_no_weight(tmp_path):
    trainer = trainer_of(tmp_path, steps=1, checkpoint_every=1)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert_bit_equal(trainer.model.state_dict(), before)


def test_a_loss_that_is_no_number_can_still_be_saved(tmp_path, monkeypatch):
    """An overflow in the loss must cost one step and not the run."""
    real, calls = update_module.grpo_loss, []

    def overflowing_once(inputs, config, totals):
        loss, metrics = real(inputs, config, totals)
        calls.append(None)
        return (loss * math.inf, metrics | {"kl": torch.tensor(math.inf)}) if len(calls) == 2 else (loss, metrics)

    monkeypatch.setattr(update_module, "grpo_loss", overflowing_once)
    history = trainer_of(tmp_path).train()
    assert [row["skipped_steps"] for row in history] == [0, 1, 1, 1]
    assert "kl" not in history[1]
    saved = json.loads((Checkpoints(tmp_path, "abc").latest()[1] / "trainer.json").read_text())
    assert saved["history"] == history


def test_questions_without_images_train_too(tmp_path):
    text = [Row(f"t{i}", "train", "say", "how many digits are red?", "4", []) for i in range(4)]
    history = trainer_of(tmp_path, train=text, steps=2).train()
    assert "visual_token_ratio" not in history[0]
    assert history[0]["token_ratio"] == 1


def test_an_empty_answer_earns_nothing(tmp_path):
    """End to end, with a score function that any answer satisfies."""
    trainer = trainer_of(tmp_path, steps=1, reward={"correct": "scenes:always_right"})
    eos = trainer.model.generation_config.eos_token_id
    trainer.model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([eos]), 100.0)
    )
    (row,) = trainer.train()
    assert (row["mean_length"], row["accuracy"], row["reward"], row["anyone_right"]) == (1, 0, 0, 0)
    assert (row["reward_efficiency"], row["zero_std_groups"]) == (0, 1)
    assert trainer.score("something", "anything") == 1


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


def test_another_configuration_starts_over(tmp_path, caplog):
    trainer_of(tmp_path, steps=2).train()
    other = trainer_of(tmp_path, identity="def", steps=2)
    assert len(other.train()) == 2
    assert "resumed" not in caplog.text


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


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"1 training rows are fewer than train.prompts_per_step \(2\)"):
        trainer_of(tmp_path, train=rows("train", 1))


def test_the_batch_arithmetic_is_printed(tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer_of(tmp_path, steps=1).train()
    assert (
        "1 steps x 2 prompts x 4 generations = 8 rollouts (8 a step, 8 a process); 0.33 epochs of 6 rows" in caplog.text
    )


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


def test_a_replay_that_is_not_the_rollout_is_warned_of_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trainer_module, "REPLAY_LIMIT", -1.0)
    trainer_of(tmp_path, steps=3).train()
    assert caplog.text.count("log-probabilities of rollout and replay differ by") == 1


def test_nothing_is_warned_of_when_replay_and_rollout_agree(tmp_path, caplog):
    trainer_of(tmp_path, steps=2).train()
    assert "rollout and replay" not in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": torch.float16}, "model.dtype 'float16' cannot be trained: its gradients underflow; use 'bfloat16'"),
        ({"rollout_prompts": 3}, r"train.rollout_prompts \(3\) must divide the 2 prompts of a process"),
        (
            {"lora": {"targets": ["q_prj"]}},
            r"train.lora.targets \['q_prj'\] are no linear layers of the decoder; it has",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, changes, message):
    with pytest.raises(TrainingError, match=message):
        trainer_of(tmp_path, **changes)


def test_a_sharded_engine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsity_forcing.rl.requirements.PARALLEL", ())
    with pytest.raises(TrainingError, match=r"in one process or data-parallel, not under NO: .* presets/accelerate/"):
        trainer_of(tmp_path)


def test_out_of_memory_names_the_parameters_to_change(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    trainer = trainer_of(tmp_path / "update")
    monkeypatch.setattr(trainer.updater, "_one_update", full)
    with pytest.raises(TrainingError, match=r"lower train.micro_batch_prompts .* Tried to allocate 9 GiB.\)$"):
        trainer.train()
    trainer = trainer_of(tmp_path / "rollout")
    monkeypatch.setattr(trainer, "_roll_out", full)
    with pytest.raises(TrainingError, match=r"lower train\.rollout_prompts"):
        trainer.train()


def test_later_iterations_see_the_stored_rollout(tmp_path, monkeypatch):
    seen = {}
    _watch(monkeypatch, seen, update_module, "grpo_loss")
    twice = trainer_of(tmp_path / "twice", steps=1, num_iterations=2, warmup_steps=0)
    (row,) = twice.train()
    (first, *_), (second, *_) = seen["grpo_loss"]
    assert torch.equal(first.old_logps, second.old_logps)
    assert torch.equal(first.old_selection_logps, second.old_selection_logps)
    assert (first.per_token_logps - first.old_logps).abs().max() < 1e-5
    assert (second.per_token_logps - second.old_logps).abs().max() > 1e-4  # the policy has moved
    assert row["replay_max_difference"] < 1e-5  # of the first: later ones differ because the policy does
    assert row["learning_rate"] == 0  # the schedule counts updates


@pytest.mark.parametrize("skips", [True, False])
def test_groups_without_a_right_answer_are_skipped_where_asked(tmp_path, skips):
    never = {"correct": "scenes:never_right"}
    (row,) = trainer_of(tmp_path, steps=1, reward=never, skip_all_wrong=skips).train()
    assert (row["grad_norm"] == 0) == skips  # kept, they are still held to the reference


@pytest.mark.parametrize("masks", [True, False])
def test_truncated_completions_are_left_out_where_asked(tmp_path, masks):
    changes = {"max_completion_length": 1, "mask_truncated_completions": masks}
    (row,) = trainer_of(tmp_path, steps=1, reward={"correct": "scenes:always_right"}, **changes).train()
    assert row["truncated"] == 1
    assert (row["grad_norm"] == 0) == masks


def test_without_a_kl_term_there_is_no_reference(tmp_path):
    trainer = trainer_of(tmp_path, steps=1, beta=0.0, reward={"correct": "scenes:always_right"})
    (row,) = trainer.train()
    assert trainer.reference is None
    assert "kl" not in row
    assert row["grad_norm"] > 0


def test_every_budget_has_its_reward_accuracy_and_advantage(tmp_path):
    (row,) = trainer_of(tmp_path, steps=1, reward={"correct": "scenes:always_right"}).train()
    for name in ("reward", "accuracy", "advantage", "visual_token_ratio"):
        assert {f"p0.600/{name}", f"p0.900/{name}"} <= row.keys()
    assert row["p0.600/reward"] > row["p0.900/reward"]
    assert row["replay_mean_difference"] <= row["replay_q99_difference"] <= row["replay_q999_difference"]
    assert row["replay_q999_difference"] <= row["replay_max_difference"]


def falling_accuracy():
    accuracy = iter([0.9, 0.8, 0.7])
    return lambda: {"accuracy": next(accuracy), "token_ratio": 0.5, "visual_token_ratio": 0.5}
