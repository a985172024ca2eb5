"""The experiments: each is the training of params.yaml with what its line says changed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import ValidationError

from sparsity_forcing.params import Params, ParamsError, SparsityParams, TrainParams


@dataclass(frozen=True)
class Arm:
    """One experiment.

    ``train``, ``sparsity``: keys of params.yaml that differ from it, sections inside as dicts. ``rows``: ``hard``
    trains on the questions that the base answers wrong with dense attention, ``undistorted`` on the same questions with
    the scans as they are. ``seed``: added to that of params.yaml.
    ``objective``: one of `alternatives.OBJECTIVES`. ``at_any_budget``: judged at `ANY_BUDGET` too.
    """

    name: str
    question: str
    train: dict = field(default_factory=dict)
    sparsity: dict = field(default_factory=dict)
    rows: Literal["all", "hard", "undistorted"] = "all"
    seed: int = 0
    objective: str = "grpo"
    at_any_budget: bool = False

    def params(self, base: Params) -> Params:
        """``base`` with what the arm changes.

        Raises:
            ParamsError: ``base`` does not allow what the arm changes.
        """
        try:
            train = TrainParams.model_validate(_merged(base.train.model_dump(), self.train))
            sparsity = SparsityParams.model_validate(_merged(base.sparsity.model_dump(), self.sparsity))
        except ValidationError as error:
            raise ParamsError(f"experiment {self.name!r} does not go with these parameters: {error}") from None
        return base.model_copy(update={"train": train, "sparsity": sparsity, "seed": base.seed + self.seed})


def _merged(values: dict, changes: dict) -> dict:
    merged = dict(values)
    for name, change in changes.items():
        merged[name] = _merged(values[name], change) if isinstance(change, dict) and values[name] else change
    return merged


def _spread(lowest: float, highest: float, count: int) -> list[float]:
    return [round(lowest + (highest - lowest) * place / (count - 1), 4) for place in range(count)]


def _seeds(arm: Arm) -> list[Arm]:
    """The arm with its seeds, the further ones judged at the deployed and the evaluated budgets alone."""
    more = [
        replace(arm, name=name, question="the same with another seed", seed=seed, at_any_budget=False)
        for seed, name in enumerate(SEEDS[arm.name][1:], start=1)
    ]
    return [arm, *more]


ANY_BUDGET = (0.5, 0.6, 0.7, 0.8, 0.9)
HEADLINES = {"default": 4, "prefill_sparse": 3, "prefill_dense": 3}
SEEDS = {name: (name, *(f"{name}_seed_{seed}" for seed in range(1, count))) for name, count in HEADLINES.items()}
SFT = {"prompts_per_step": 32, "beta": 0.0}
ARMS = {
    arm.name: arm
    for arm in (
        *_seeds(Arm("default", "what the parameters of params.yaml give", at_any_budget=True)),
        Arm(
            "literal",
            "the paper's objective as written: token log-probabilities alone, plain group advantages",
            {"selection_policy": {"sigma": 0.0}, "center_by_budget": False, "reward": {"target_ratio": None}},
        ),
        Arm("no_efficiency", "is it the efficiency reward, or sampling alone?", {"reward": {"weight_efficiency": 0.0}}),
        Arm("shuffled", "every rollout is paid for a cost drawn from the whole step", {"reward": {"shuffle": True}}),
        Arm("undistorted", "trained on the scans that the base was trained on", rows="undistorted"),
        Arm(
            "no_target",
            "paid for fewer tokens to the end, the sparsest step chosen",
            {"reward": {"target_ratio": None}},
        ),
        Arm("layers_alike", "every layer's selection pushed alike", {"selection_policy": {"credit": "layer"}}),
        Arm("layers_joint", "a layer's selection paid the joint reward", {"selection_policy": {"credit": "joint"}}),
        Arm("raw_advantages", "without centring by budget", {"center_by_budget": False}),
        Arm("one_budget", "the deployed budget alone instead of eight", {"budgets": [0.975]}),
        Arm("hard", "trained on questions the base gets wrong, C on", rows="hard"),
        Arm("hard_no_gate", "the same questions, C off", {"reward": {"gate": "always"}}, rows="hard"),
        Arm("scale_batch", "advantages scaled by the batch's deviation", {"scale_rewards": "batch"}),
        Arm("scale_none", "advantages not scaled", {"scale_rewards": "none"}),
        Arm("sigma_0.25", "less noise in the selection", {"selection_policy": {"sigma": 0.25}}),
        Arm("sigma_1", "more noise in the selection", {"selection_policy": {"sigma": 1.0}}),
        Arm("weight_0.01", "half the weight of the selection term", {"selection_policy": {"weight": 0.01}}),
        Arm("weight_0.04", "twice the weight of the selection term", {"selection_policy": {"weight": 0.04}}),
        Arm(
            "group_2",
            "groups of 2, of two budgets, as many rollouts",
            {"num_generations": 2, "prompts_per_step": 32, "budgets": [0.94, 0.975]},
        ),
        Arm(
            "group_2_raw",
            "the same without centring by budget",
            {"num_generations": 2, "prompts_per_step": 32, "budgets": [0.94, 0.975], "center_by_budget": False},
        ),
        Arm(
            "group_4",
            "groups of 4, of four budgets, as many rollouts",
            {"num_generations": 4, "prompts_per_step": 16, "budgets": [0.94, 0.95, 0.965, 0.975]},
        ),
        Arm("budgets_wide", "budgets from 0.6 on", {"budgets": _spread(0.6, 0.975, 8)}, at_any_budget=True),
        Arm("budgets_narrow", "budgets from 0.968 on", {"budgets": _spread(0.968, 0.975, 8)}),
        Arm(
            "cache_bytes", "paid for cache bytes instead of the token ratio", {"reward": {"efficiency": "cache_bytes"}}
        ),
        Arm("latency", "paid for modelled decode latency instead", {"reward": {"efficiency": "latency"}}),
        Arm("sft", "fine-tuned on the answers under sparse attention at the deployed budget", SFT, objective="sft"),
        Arm("sft_entropy", "the same, attention with low entropy rewarded", SFT, objective="entropy"),
        Arm("sft_largest_share", "the same, a large share of one token rewarded", SFT, objective="largest_share"),
        Arm("sft_relaxed_ratio", "the same, a relaxed token ratio added to the loss", SFT, objective="relaxed_ratio"),
        Arm(
            "sft_relaxed_ratio_slow",
            "the same, a fifth of the learning rate",
            SFT | {"learning_rate": 2e-4},
            objective="relaxed_ratio",
        ),
        Arm(
            "dpo",
            "DPO on rollouts: the right answer that keeps fewest over the rest of its group",
            {"selection_policy": {"sigma": 0.0}},
            objective="dpo",
        ),
        *_seeds(Arm("prefill_sparse", "sparse prefill in training and deployment", sparsity={"prefill": "sparse"})),
        *_seeds(Arm("prefill_dense", "dense prefill in training and deployment", sparsity={"prefill": "dense"})),
    )
}
