"""The objectives that the RL stage is compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_prompts import sharp_model

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.evidence.alternatives import (
    OBJECTIVES,
    entropy,
    not_in_one,
    preferred,
    relaxed_ratio,
)
from sparsity_forcing.params import DigitsParams, SparsityParams, TrainParams
from sparsity_forcing.rl.errors import TrainingError


def trainer_of(objective: str, directory: Path, **changes):
    config = {"steps": 3, "prompts_per_step": 2, "num_generations": 4, "budgets": (0.6, 0.9), "warmup_steps": 0}
    config |= {"validate_every": 3, "validation_rows": 3, "max_completion_length": 3, "accuracy_guard": 1.0}
    config |= {"learning_rate": 1e-2, "selection_policy": {"sigma": 0.0}}
    model, processor = sharp_model(dtype=torch.float64)
    train, validation = (
        [digits_row(DigitsParams(grids=(4, 5)), 0, split, place) for place in range(6)]
        for split in ("train", "validation")
    )
    return OBJECTIVES[objective](
        model,
        processor,
        train,
        validation,
        TrainParams(**{**config, **changes}),
        SparsityParams(p=0.8),
        3,
        Checkpoints(directory, "abc"),
        lambda metrics, table: None,
    )


def some_shares(batch: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log shares over the droppable tokens, those tokens, and kept ones."""
    generator = torch.Generator().manual_seed(0)
    droppable = torch.rand(batch, length, generator=generator) > 0.2
    scores = torch.randn(batch, length, generator=generator, dtype=torch.float64).masked_fill(~droppable, -torch.inf)
    log_share = scores.log_softmax(-1).masked_fill(~droppable, 0.0)
    kept = (log_share > log_share.masked_fill(~droppable, torch.inf).median(-1, keepdim=True).values) | ~droppable
    return log_share, droppable, kept


def test_penalties_against_plain_loops():
    log_share, droppable, kept = some_shares()
    found = [penalty(log_share, droppable, kept) for penalty in (entropy, not_in_one, relaxed_ratio)]
    for row in range(len(log_share)):
        shares = log_share[row][droppable[row]].exp()
        assert shares.sum() == pytest.approx(1.0)
        even = torch.distributions.Categorical(torch.ones_like(shares)).entropy()
        assert found[0][row] == pytest.approx(float(torch.distributions.Categorical(shares).entropy() / even))
        assert found[1][row] == pytest.approx(1 - float(shares.max()))
        last = log_share[row][droppable[row] & kept[row]].min()
        soft = [torch.sigmoid((share.log() - last) / 0.5) for share in shares]
        assert found[2][row] == pytest.approx(float(sum(soft) / len(soft)))


@pytest.mark.parametrize("penalty", [entropy, not_in_one, relaxed_ratio])
def test_a_step_down_a_penalty_sharpens_the_attention(penalty):
    """The share of the most attended token grows, whichever penalty is followed."""
    _, droppable, kept = some_shares()
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def log_share(scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~droppable, -torch.inf).log_softmax(-1).masked_fill(~droppable, 0.0)

    before = log_share(scores)
    kept = kept | (before == before.masked_fill(~droppable, -torch.inf).amax(-1, keepdim=True))
    penalty(before, droppable, kept).sum().backward()
    after = log_share((scores - 0.1 * scores.grad).detach())
    largest = [share.masked_fill(~droppable, -torch.inf).amax(-1) for share in (before, after)]
    assert (largest[1] > largest[0]).all()


def test_supervision_is_the_cross_entropy_of_the_deployed_model(tmp_path):
    """Of `Replay` on a rollout whose answer is exchanged for the right one."""
    trainer = trainer_of("sft", tmp_path, prompts_per_step=3, beta=0.0, learning_rate=1e-9)
    rows = trainer.rows[:3]
    with decoder_attention(trainer.model):
        deployed = trainer.sampler.deployed(rows)
        tokenizer, losses = trainer.processor.tokenizer, []
        for row in rows:
            prompts, one = trainer.sampler.prompts([row]), trainer.sampler.deployed([row])
            tokens = torch.tensor([[*tokenizer(row.answer).input_ids, tokenizer.eos_token_id]])
            exchanged = replace(one, completions=tokens, completion_mask=torch.ones_like(tokens, dtype=torch.bool))
            logps, _ = trainer.passes(prompts, exchanged, 1)
            losses += logps[0].tolist()
        metrics, table = trainer.learn(rows)
    assert metrics["loss"] == metrics["cross_entropy"] == pytest.approx(-sum(losses) / len(losses), rel=1e-6)
    assert 0 < deployed.visual_token_ratio.mean() < 1
    assert table() == []


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("grpo", "dpo")])
def test_supervision_learns_what_it_says(tmp_path, objective):
    trainer = trainer_of(objective, tmp_path, prompts_per_step=6, beta=0.0, steps=8)
    history = trainer.train()
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"]
    assert ("penalty" in history[0]) == (objective != "sft")
    assert sum(row["rollouts"] for row in history) == 0


@pytest.mark.parametrize("objective", ["entropy", "largest_share", "relaxed_ratio"])
def test_the_penalty_reaches_the_weights(tmp_path, objective):
    trainer = trainer_of(objective, tmp_path, prompts_per_step=6, beta=0.0, steps=8, max_grad_norm=100.0)
    trainer.weight = 100.0
    history = trainer.train()
    assert history[-1]["penalty"] < 0.99 * history[0]["penalty"]


@pytest.mark.parametrize(
    "objective, wrong, words",
    [
        ("dpo", {"beta": 0.0}, "train.beta above 0"),
        ("dpo", {"rollout_prompts": 1}, "leave train.rollout_prompts out"),
        ("sft", {"num_iterations": 2}, "train.num_iterations to 1"),
    ],
)
def test_what_an_alternative_cannot_do_is_refused(tmp_path, objective, wrong, words):
    with pytest.raises(TrainingError, match=words):
        trainer_of(objective, tmp_path, **wrong)


def test_the_preferred_rollout_is_right_and_keeps_fewest():
    correct = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    ratio = torch.tensor([[0.9, 0.5, 0.1, 0.2], [0.3, 0.1, 0.2, 0.4], [0.1, 0.2, 0.9, 0.3]])
    chosen, pairs = preferred(correct, ratio)
    assert chosen[0] == 1
    assert chosen[2] == 2
    assert pairs.tolist() == [[True, False, True, True], [False] * 4, [True, True, False, True]]


def test_preferences_widen_the_margin_of_the_preferred_answer(tmp_path, monkeypatch):
    """With the reference at the start, the loss is log 2; a step on the same rollouts lowers it."""
    trainer = trainer_of("dpo", tmp_path, beta=1.0, max_grad_norm=100.0)
    rows = trainer.rows[:2]
    monkeypatch.setattr(trainer, "score", lambda said, answer: float(len(said) % 2))
    with decoder_attention(trainer.model), decoder_attention(trainer.reference):
        part = trainer._roll_out(rows)
        monkeypatch.setattr(trainer, "_roll_out", lambda rows: part)
        own = trainer.passes(part[0].prompts, part[0].rollouts, part[0].group)[0].detach()
        monkeypatch.setattr(trainer, "_reference_logps", lambda part: own)
        losses = [trainer.learn(rows)[0] for _ in range(3)]
    assert losses[0]["pairs"] in (3.0, 6.0)
    assert losses[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert losses[2]["loss"] < losses[1]["loss"] < losses[0]["loss"]
