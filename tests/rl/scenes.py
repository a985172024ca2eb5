"""Prompts, rollouts and updates of a small policy."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import torch
from tiny_prompts import Question, encode
from torch import Tensor

from sparsity_forcing.generation.prompts import Prompts, build_prompts
from sparsity_forcing.models.families import visual_token_ids
from sparsity_forcing.params import SparsityParams
from sparsity_forcing.rl.replay import Replay
from sparsity_forcing.rl.rollout import Rollouts, Sampling, roll_out

TEMPERATURE = 1.5


def prompts_of(model, processor, questions: list[Question], settings: SparsityParams, encode_images=True) -> Prompts:
    return build_prompts(model, encode(processor, questions, model.dtype), settings, encode_images)


def suppressed(model) -> Tensor:
    return torch.tensor(visual_token_ids(model.config))


def sampling(model, temperature: float = TEMPERATURE, tokens: int = 5) -> Sampling:
    config = model.generation_config
    return Sampling(temperature, tokens, (config.eos_token_id,), config.pad_token_id, suppressed(model))


def rollouts_of(model, prompts: Prompts, p: Tensor, group: int, settings: SparsityParams, **options) -> Rollouts:
    """Sampled rollouts, the same for the same ``seed``."""
    seed, sigma = options.pop("seed", 0), options.pop("sigma", 0.0)
    generator = torch.Generator().manual_seed(seed)
    return roll_out(model, prompts, p, group, settings, sampling(model, **options), sigma, generator)


def cut_short(rollouts: Rollouts, lengths: list[int]) -> Rollouts:
    """The rollouts with other completion lengths, as if a stop token had been sampled."""
    mask = torch.arange(rollouts.completions.shape[1]) < torch.tensor(lengths)[:, None]
    return replace(rollouts, completion_mask=mask, logps=rollouts.logps.masked_fill(~mask, 0.0))


def replay_of(model, settings: SparsityParams, **memory) -> Replay:
    return Replay(model, settings, TEMPERATURE, suppressed(model), **memory).train()


def replayed(model, prompts: Prompts, rollouts: Rollouts, group: int, settings: SparsityParams, **memory):
    """What the update pass computes: log-probabilities, and log-densities of the selection."""
    return replay_of(model, settings, **memory)(prompts, rollouts, group)


def gradients(model, *objectives: Tensor) -> dict[str, Tensor]:
    """Gradient of the sum of the objectives, by parameter; those that get none are left out."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(sum(objectives), list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def always_right(prediction: str, answer: str) -> float:
    """A score function for `reward.correct`."""
    return 1.0


def never_right(prediction: str, answer: str) -> float:
    return 0.0


_answers = itertools.count(1)


def fails_in_one_process(prediction: str, answer: str) -> float:
    """Right; from the 12th answer on an error in the process that the environment names."""
    if next(_answers) >= 12 and os.environ.get("RANK") == os.environ.get("FAILING_RANK", "none"):
        raise RuntimeError("no score for this answer")
    return 1.0


def a_list(prediction: str, answer: str) -> list[float]:
    """No score: of one prediction where one is asked for, as if of a batch."""
    return [1.0]


def wants_seven(prediction: str, answer: str) -> float:
    """A score that depends on whose answer it is shown."""
    return float(answer == "7")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Every gradient within ``tolerance`` of the other's norm; transformers' norm layers are float32 inside."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name
