"""The trainer: skipped steps, what it logs and what it leaves behind."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from runs import SPARSITY, Recorder, StopAfter, assert_bit_equal, rows, trainer_of

import sparsity_forcing.rl.sampler as sampler_module
import sparsity_forcing.rl.trainer as trainer_module
import sparsity_forcing.rl.update as update_module
from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.data.schema import Row
from sparsity_forcing.params import SparsityParams, load_params
from sparsity_forcing.rl.errors import TrainingError, explained_memory
from sparsity_forcing.rl.requirements import require_trainable
from sparsity_forcing.rl.rewards import group_advantages, joint_rewards

ROOT = Path(__file__).parents[2]


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
        assert row["clip_ratio/region_mean"] == 0
        assert row["rollouts"] == 8
        assert 8 <= row["new_tokens"] <= 32
        assert 0 < row["visual_token_ratio"] < row["token_ratio"] < 1
        assert row["p0.6/visual_token_ratio"] < row["p0.9/visual_token_ratio"]
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


def test_the_scale_of_the_selection_goes_from_the_first_to_the_last(tmp_path, monkeypatch):
    seen = {}
    _watch(monkeypatch, seen, sampler_module, "roll_out")
    policy = {"sigma": 0.8, "final_sigma": 0.2}
    history = trainer_of(tmp_path, steps=3, validate_every=4, selection_policy=policy).train()
    used = [found.sigma for found in seen["roll_out"][1:4]]  # the first is of the start's validation
    assert used == [row["sigma"] for row in history] == pytest.approx([0.8, 0.5, 0.2])
    assert max(row["replay_max_difference"] for row in history) < 1e-5


def test_a_selection_without_noise_stays_without_it(tmp_path):
    history = trainer_of(tmp_path, steps=2, selection_policy={"sigma": 0, "final_sigma": 0.2}).train()
    assert [row["sigma"] for row in history] == [0, 0]


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
    assert (row["completions/mean_length"], row["accuracy"], row["reward"], row["anyone_right"]) == (1, 0, 0, 0)
    assert (row["reward_efficiency"], row["frac_reward_zero_std"]) == (0, 1)
    assert trainer.score("something", "anything") == 1


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(TrainingError, match=r"1 training rows are fewer than train.prompts_per_step \(2\)"):
        trainer_of(tmp_path, train=rows("train", 1))


def test_pairs_of_two_budgets_are_warned_of(tmp_path, caplog):
    for changes, warned in (({"num_generations": 2}, True), ({"num_generations": 2, "scale_rewards": "none"}, False)):
        caplog.clear()
        trainer_of(tmp_path / str(warned), steps=1, **changes).train()
        assert ("Efficiency is not learned; set train.num_generations to 4" in caplog.text) == warned


def test_the_batch_arithmetic_is_printed(tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer_of(tmp_path, steps=1).train()
    assert (
        "1 steps x 2 prompts x 4 generations = 8 rollouts (8 a step, 8 a process); 0.33 epochs of 6 rows" in caplog.text
    )


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
    with pytest.raises(
        TrainingError, match=r"in one process, data-parallel or under FSDP2, not under NO; .* presets/accelerate/"
    ):
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
    with pytest.raises(TrainingError, match=r"lower train\.rollout_prompts \(2 now\)"):
        trainer.train()


def test_out_of_memory_of_the_cpu_is_told_from_other_errors():
    with pytest.raises(TrainingError, match=r"^the device is out of memory; lower it \("), explained_memory("lower it"):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="size"), explained_memory("lower it"):
        torch.zeros(2) @ torch.zeros(3)


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
    assert row["completions/clipped_ratio"] == 1
    assert (row["grad_norm"] == 0) == masks


def test_without_a_kl_term_there_is_no_reference(tmp_path):
    trainer = trainer_of(tmp_path, steps=1, beta=0.0, reward={"correct": "scenes:always_right"})
    (row,) = trainer.train()
    assert trainer.reference is None
    assert "kl" not in row
    assert row["grad_norm"] > 0


def test_every_budget_has_its_reward_accuracy_and_advantage(tmp_path):
    (row,) = trainer_of(tmp_path, steps=1, reward={"correct": "scenes:always_right"}).train()
    for name in ("reward", "accuracy", "advantage", "token_ratio", "visual_token_ratio"):
        assert {f"p0.6/{name}", f"p0.9/{name}"} <= row.keys()
    assert row["p0.6/reward"] > row["p0.9/reward"]
    assert row["p0.6/advantage"] > 0.1  # right every time, and with fewer tokens
    assert row["p0.6/advantage"] == pytest.approx(-row["p0.9/advantage"])
    assert row["replay_mean_difference"] <= row["replay_q99_difference"] <= row["replay_q999_difference"]
    assert row["replay_q999_difference"] <= row["replay_max_difference"]


@pytest.mark.parametrize("launcher", sorted((ROOT / "presets/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", ["params.yaml", "presets/digits-gpu.yaml", "presets/qwen2.5-vl-7b.yaml"])
def test_a_preset_divides_over_the_processes_of_every_launcher(preset, launcher):
    world = yaml.safe_load(launcher.read_text())["num_processes"]
    accelerator = SimpleNamespace(num_processes=world, distributed_type=DistributedType.MULTI_GPU)
    model = SimpleNamespace(dtype=torch.bfloat16)
    require_trainable(model, 10_000, load_params(ROOT / preset).train, accelerator)


def test_a_score_function_that_fails_names_the_parameter(tmp_path):
    trainer = trainer_of(tmp_path, reward={"correct": "scenes:a_list"})
    with pytest.raises(
        TrainingError, match=r"returned \[1\.0\] for .*; train\.reward\.correct in params\.yaml names it"
    ):
        trainer.train()
    with pytest.raises(TrainingError, match=r"'no_such' is unknown.*; train\.reward\.correct"):
        trainer_of(tmp_path, reward={"correct": "no_such"})
