"""The section `train`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from sparsity_forcing.params.fields import (
    AtLeastTwo,
    Budget,
    Name,
    NonEmptyUnique,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
)


class RewardParams(Section):
    """r = correct + weight_efficiency * C * (1 - cost), C = 1 for a group in which any rollout is right.

    ``efficiency``: what the cost is, relative to dense attention. The ``token_ratio`` (the paper's); the
    ``cache_bytes``, generated tokens included; or the ``latency`` of a decode step that ``latency_batch`` answers
    share, modelled by the bytes it reads.

    ``correct``: a score function of `sparsity_forcing.scoring` by name (exact_match, numeric, multiple_choice, relaxed,
    anls, math_equal) or ``module:function``.

    ``target_ratio``: the efficiency part is paid while the rollouts of the last 10 steps, at the budget nearest to the
    deployed one, keep more than this share of the visual tokens: once there, the training is for the accuracy. With
    ``selection_policy.sigma`` above 0 they keep a little less than is kept at deployment: aim below what is wanted
    there. Null: always paid.
    ``gate``: when C is 1; ``always`` leaves it out. ``shuffle``: the costs of a step are dealt out to its rollouts at
    random, a control.
    """

    correct: Name = "exact_match"
    weight_efficiency: NonNegativeFloat = 1.0
    target_ratio: Share | None = None
    efficiency: Literal["token_ratio", "cache_bytes", "latency"] = "token_ratio"
    latency_batch: Positive = 1
    gate: Literal["anyone_right", "always"] = "anyone_right"
    shuffle: bool = False


class SelectionPolicyParams(Section):
    """The stochastic selection term, an addition to the paper; ``sigma`` 0 leaves it out, whatever the others are.

    ``final_sigma``: σ goes in a line from ``sigma`` in the first step to this in the last; null: it stays.

    ``credit``: what judges a layer's selection. ``joint``: the rollout's reward, as its tokens are. ``layer``: the
    same reward with the layer's own ratio in the place of the mean over layers, so that a layer is not paid for what
    the others drew. ``layer_by_share``: the same, times what the layer keeps relative to the mean over layers: pushed
    most where most is left, and least in layers that keep little already.
    """

    sigma: NonNegativeFloat = 0.5
    weight: NonNegativeFloat = 0.01
    credit: Literal["layer", "layer_by_share", "joint"] = "layer"
    final_sigma: PositiveFloat | None = None


class LoraParams(Section):
    """Low-rank adapters on the decoder instead of all its weights; the reference is the model without them.

    ``targets``: names of the linear layers that get one. ``alpha`` / ``r`` scales them. They are merged at the end.
    """

    r: Positive = 16
    alpha: PositiveFloat = 32.0
    targets: NonEmptyUnique[str] = ("q_proj", "k_proj", "v_proj", "o_proj")


class TrainParams(Section):
    """The GRPO stage; names follow TRL where it has one.

    The literal objective of the paper is ``selection_policy.sigma: 0`` *and* ``center_by_budget: false``, with no
    ``reward.target_ratio``, which is the default; all other defaults are settings that the paper leaves open (its clip
    range, beta, learning rate, lengths are not published).

    One step: ``prompts_per_step`` prompts, ``num_generations`` rollouts each, ``num_iterations`` updates on them
    (``warmup_steps`` counts updates). ``skip_all_wrong`` and ``mask_truncated_completions`` leave rollouts out of the
    loss: those of groups without a right answer, those that ran into ``max_completion_length``.

    Memory, without a change of the objective: ``micro_batch_prompts`` prompts share a backward pass and
    ``rollout_prompts`` a rollout (null: all of a process; noise is drawn for the prompts that are rolled out together);
    a frozen vision tower (``freeze_vision``; its projector too) encodes an image once for all passes of a step (in
    every pass where the model's class takes pixels alone), one that learns in every pass;
    ``logits_chunk`` tokens have their logits at a time (null: all); ``gradient_checkpointing`` computes the decoder's
    activations again in the backward pass; ``lora`` trains adapters.

    ``attention_dtype``: of attention among kept tokens in rollouts and updates. ``float64``: on a CPU a float32 model's
    replayed log-probabilities then equal those of the rollout (with ``lora`` to 5e-6), for about half as much time
    again a step.

    ``accuracy_guard``: the policy handed back is that of the validated step which keeps the fewest tokens among those
    whose accuracy at the deployment budget is at most this much below the start's; with ``reward.target_ratio`` the
    most accurate of those before which the rollouts of 10 steps, at the budget nearest to the deployed one, kept at
    most that, if there are such. With no step inside the guard it is that of the last step.
    ``stop_below_guard``: so many validations in a row below the guard end the training; 0 never.
    """

    steps: Positive = 350
    prompts_per_step: Positive = 8
    num_generations: AtLeastTwo = 8
    num_iterations: Positive = 1
    budgets: NonEmptyUnique[Budget] = (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975)
    learning_rate: PositiveFloat = 5e-4
    warmup_steps: NonNegative = 10
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    beta: NonNegativeFloat = 0.04
    epsilon: PositiveFloat = 0.2
    epsilon_high: PositiveFloat = 0.2
    scale_rewards: Literal["group", "batch", "none"] = "group"
    center_by_budget: bool = True
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    skip_all_wrong: bool = False
    mask_truncated_completions: bool = False
    temperature: PositiveFloat = 1.0
    max_completion_length: Positive = 16
    attention_dtype: Literal["model", "float64"] = "model"
    reward: RewardParams = RewardParams()
    selection_policy: SelectionPolicyParams = SelectionPolicyParams()
    freeze_vision: bool = True
    lora: LoraParams | None = None
    rollout_prompts: Positive | None = None
    micro_batch_prompts: Positive | None = None
    logits_chunk: Positive | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: Positive = 50
    keep_checkpoints: AtLeastTwo = 2
    validate_every: Positive = 25
    validation_rows: Positive = 384
    validation_batch_size: Positive = 48
    accuracy_guard: Share = 0.01
    stop_below_guard: NonNegative = 0
    log_samples_every: Positive = 50

    @model_validator(mode="after")
    def _one_budget_per_rollout(self) -> Self:
        if self.num_generations % len(self.budgets):
            raise ValueError(
                f"num_generations ({self.num_generations}) must be a multiple of the number of budgets "
                f"({len(self.budgets)}): every rollout of a group has a budget of its own turn"
            )
        return self

    @model_validator(mode="after")
    def _lora_trains_the_decoder(self) -> Self:
        if self.lora is not None and not self.freeze_vision:
            raise ValueError("lora trains adapters of the decoder: set freeze_vision to true, or leave lora out")
        return self
