"""params.yaml as validated types.

One file holds every parameter of the pipeline. A preset is such a file (``presets/``). What is left out has the default
written here; what is unknown, out of range or contradictory is an error that names the key, the value and what is
allowed, before anything runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

Budget = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Rule = Literal["top_p", "top_k", "threshold"]
RankBy = Literal["normalized", "raw"]
ScoringRows = Literal["text", "probe", "all"]
PrefillKind = Literal["suffix", "sparse", "dense"]
Impl = Literal["auto", "eager", "triton"]
Task = Literal["read", "count", "sum"]
Grid = Annotated[int, Field(ge=3, le=64)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator in use takes
COLOURED_DIGITS = 4  # on a canvas of the digits source


def _non_empty_unique(values: tuple) -> tuple:
    if not values or len(set(values)) != len(values):
        raise ValueError("needs at least one entry and no entry twice")
    return values


Item = TypeVar("Item")
NonEmptyUnique = Annotated[tuple[Item, ...], AfterValidator(_non_empty_unique)]


class ParamsError(ValueError):
    """A parameter file is not usable; the message names every key at fault, its value and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class SparsityParams(_Section):
    """How a layer selects its kept set."""

    p: Budget = 0.975
    rule: Rule = "top_p"
    rank_by: RankBy = "normalized"
    scoring_rows: ScoringRows = "text"
    prefill: PrefillKind = "suffix"
    protect_text: bool = True
    protect_first: NonNegative = 4
    protect_last: Positive = 1
    probe_recent: Positive = 64
    probe_random: NonNegative = 64
    probe_seed: Seed = 0
    impl: Impl = "auto"


def _require_room(
    grids: tuple[int, ...], coloured: int, grey_share: float, clutter_share: float, what: str = ""
) -> None:
    """A canvas holds its coloured and grey digits and its clutter; ``what`` opens the message if it does not."""
    for grid in grids:
        cells = grid * grid
        taken = coloured + round(grey_share * cells) + round(clutter_share * cells)
        if taken > cells:
            raise ValueError(
                f"{what}a {grid}x{grid} grid has {cells} cells, too few for {taken}: {coloured} coloured digits, "
                f"grey_share {grey_share} and clutter_share {clutter_share}; lower a share or take a larger grid"
            )


class DigitsParams(_Section):
    """The embedded source: splits of rendered questions, the same share of every task and grid.

    ``distorted``: the scans of the training questions go through `data.digits.distort`; those of other splits never do.
    """

    grids: NonEmptyUnique[Grid] = (8, 12)
    tasks: NonEmptyUnique[Task] = ("read", "count", "sum")
    train_rows: Positive = 4096
    validation_rows: Positive = 384
    test_rows: Positive = 2400
    grey_share: Share = 0.1
    clutter_share: Share = 0.16
    distorted: bool = False

    @model_validator(mode="after")
    def _room_for_coloured_digits(self) -> Self:
        self.require_room(self.grids)
        return self

    def require_room(self, grids: tuple[int, ...], what: str = "") -> None:
        """Raises ValueError, opening with ``what``, unless a canvas of each of ``grids`` holds what is drawn on it."""
        _require_room(grids, COLOURED_DIGITS, self.grey_share, self.clutter_share, what)


class UserDataParams(_Section):
    """The user's own rows: one file below user_data/, which is the folder that DVC watches.

    Rows that name no split are split by a seeded hash of their images (of the row id where there are none), so that all
    questions about one image are in one split. ``tasks``: the task names that are allowed; empty allows any. A video
    gives at most ``max_video_frames`` images.
    """

    path: Path | None = None
    tasks: tuple[str, ...] = ()
    max_video_frames: Positive = 16
    validation_share: Share = 0.1
    test_share: Share = 0.2

    @model_validator(mode="after")
    def _rows_left_for_training(self) -> Self:
        if self.validation_share + self.test_share >= 1.0:
            raise ValueError(
                f"validation_share + test_share must be below 1 to leave rows for training, got "
                f"{self.validation_share} + {self.test_share}"
            )
        return self


class DataParams(_Section):
    source: Literal["digits", "chat_jsonl", "parquet"] = "digits"
    digits: DigitsParams = DigitsParams()
    user: UserDataParams = UserDataParams()
    max_question_characters: Positive = 4000
    max_quarantine_fraction: Share = 0.05

    @model_validator(mode="after")
    def _path_given(self) -> Self:
        if self.source != "digits" and self.user.path is None:
            raise ValueError(f"source {self.source!r} needs user.path: the file with your rows")
        return self


class ScratchModel(_Section):
    """Sizes of the default model, a `Qwen2_5_VLForConditionalGeneration` built from scratch."""

    hidden_size: Positive = 64
    intermediate_size: Positive = 128
    layers: Positive = 8
    heads: Positive = 4
    kv_heads: Positive = 2
    vision_layers: Positive = 1
    vision_hidden_size: Positive = 48
    vision_heads: Positive = 2

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 16:
            raise ValueError(f"hidden_size / heads must be a multiple of 16, got {self.hidden_size} / {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.vision_hidden_size % (4 * self.vision_heads):  # rotary angles of rows and columns, in pairs
            raise ValueError(
                f"vision_hidden_size must be a multiple of 4 * vision_heads, got {self.vision_hidden_size} and "
                f"{self.vision_heads} heads"
            )
        return self


class Phase(_Section):
    """One phase of the curriculum: a mixture of grids and tasks, trained for some steps.

    ``until``: it goes on until that share of the answers of its last 50 batches is right, for ``at_most`` steps; if it
    is not by then, the training ends with an error. When a small model sees through a task is chance, and what follows
    is lost on one that has not. For phases that end, with ``steps`` steps each, in the first half of the curriculum: in
    the second the learning rate falls.
    """

    steps: Positive
    until: Share | None = None
    at_most: Positive | None = None
    batch_size: Positive = 32
    grids: NonEmptyUnique[Grid] = (8,)
    tasks: NonEmptyUnique[Task] = ("read", "count", "sum")
    grey_share: Share = 0.1
    clutter_share: Share = 0.16
    coloured: Annotated[int, Field(ge=2)] = COLOURED_DIGITS

    @model_validator(mode="after")
    def _open_ended_up_to_a_limit(self) -> Self:
        if (self.until is None) != (self.at_most is None):
            raise ValueError("until and at_most go together: the share to reach, and the steps it may take")
        if self.at_most is not None and self.at_most < self.steps:
            raise ValueError(f"at_most ({self.at_most}) must be at least steps ({self.steps})")
        return self

    @model_validator(mode="after")
    def _room_for_coloured_digits(self) -> Self:
        _require_room(self.grids, self.coloured, self.grey_share, self.clutter_share)
        return self


class ModelParams(_Section):
    """``name``: `scratch`, a hub id, or a `save_pretrained` directory below user_models/, the folder that DVC watches.

    The model trained from scratch is validated on the grids, tasks and shares of the last phase of its curriculum.
    """

    name: str = Field(default="scratch", min_length=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scratch: ScratchModel = ScratchModel()
    curriculum: tuple[Phase, ...] = ()
    learning_rate: PositiveFloat = 2e-3
    warmup_steps: NonNegative = 100
    checkpoint_every: Positive = 50
    min_accuracy: Share = 0.0
    validation_rows: Positive = 300

    @model_validator(mode="after")
    def _curriculum_for_scratch(self) -> Self:
        if self.name == "scratch" and not self.curriculum:
            raise ValueError("name 'scratch' needs a curriculum with at least one phase")
        return self

    @model_validator(mode="after")
    def _open_ended_while_the_rate_is_constant(self) -> Self:
        half, end = sum(phase.steps for phase in self.curriculum) // 2, 0
        for number, phase in enumerate(self.curriculum, start=1):
            end += phase.steps
            if phase.until is not None and end > half:
                raise ValueError(
                    f"phase {number} of the curriculum ends at step {end} of {2 * half}, when the learning rate falls: "
                    "until and at_most are for phases in the first half"
                )
        return self

    @model_validator(mode="after")
    def _last_phase_can_be_validated(self) -> Self:
        if self.name == "scratch":
            last = self.curriculum[-1]
            what = "the model is validated on the last phase of the curriculum, with all coloured digits: "
            _require_room(last.grids, COLOURED_DIGITS, last.grey_share, last.clutter_share, what)
        return self


class ProfileParams(_Section):
    """``rows``: questions per setting. ``grids`` are the prompt lengths of the digits source; the user's own rows are
    taken in thirds by length.
    """

    budgets: NonEmptyUnique[Budget] = (0.5, 0.7, 0.8, 0.9, 0.94, 0.975, 1.0)
    scoring_rows: NonEmptyUnique[ScoringRows] = ("text", "probe", "all")
    grids: NonEmptyUnique[Grid] = (6, 8, 12)
    rows: Positive = 96
    batch_size: Positive = 48
    max_new_tokens: Positive = 16


class RewardParams(_Section):
    """r = correct + weight_efficiency * C * (1 - cost), C = 1 for a group in which any rollout is right.

    ``correct``: a score function of `sparsity_forcing.scoring` by name (exact_match, numeric, multiple_choice, relaxed,
    anls, math_equal) or ``module:function``.

    ``cost``, relative to dense attention: the ``token_ratio`` (the paper's); the ``cache_bytes``, generated tokens
    included; or the ``latency`` of a decode step that ``latency_batch`` answers share, modelled by the bytes it reads.
    ``target_ratio``: the efficiency part is paid while the rollouts of the last 10 steps, at the budget nearest to the
    deployed one, keep more than this share of the visual tokens: once there, the training is for the accuracy. With
    ``selection_policy.sigma`` above 0 they keep a little less than is kept at deployment: aim below what is wanted
    there. Null: always paid.
    ``gate``: when C is 1; ``always`` leaves it out. ``shuffle``: the costs of a step are dealt out to its rollouts at
    random, a control.
    """

    correct: str = Field(default="exact_match", min_length=1)
    weight_efficiency: NonNegativeFloat = 1.0
    target_ratio: Share | None = None
    cost: Literal["token_ratio", "cache_bytes", "latency"] = "token_ratio"
    latency_batch: Positive = 1
    gate: Literal["anyone_right", "always"] = "anyone_right"
    shuffle: bool = False


class SelectionPolicyParams(_Section):
    """The stochastic selection term, an addition to the paper; ``sigma`` 0 leaves it out.

    ``credit``: what judges a layer's selection. ``joint``: the rollout's reward, as its tokens are. ``layer``: the
    same reward with the layer's own ratio in the place of the mean over layers, so that a layer is not paid for what
    the others drew. ``layer_by_share``: the same, times what the layer keeps relative to the mean over layers: pushed
    most where most is left, and least in layers that keep little already.
    """

    sigma: NonNegativeFloat = 0.5
    weight: NonNegativeFloat = 0.01
    credit: Literal["layer", "layer_by_share", "joint"] = "layer"


class LoraParams(_Section):
    """Low-rank adapters on the decoder instead of all its weights; the reference is the model without them.

    ``targets``: names of the linear layers that get one. ``alpha`` / ``r`` scales them. They are merged at the end.
    """

    r: Positive = 16
    alpha: PositiveFloat = 32.0
    targets: NonEmptyUnique[str] = ("q_proj", "k_proj", "v_proj", "o_proj")


class TrainParams(_Section):
    """The GRPO stage; names follow TRL where it has one.

    The literal objective of the paper is ``selection_policy.sigma: 0`` *and* ``center_by_budget: false``; all other
    defaults are settings that the paper leaves open (its clip range, beta, learning rate, lengths are not published).

    One step: ``prompts_per_step`` prompts, ``num_generations`` rollouts each, ``num_iterations`` updates on them
    (``warmup_steps`` counts updates). ``skip_all_wrong`` and ``mask_truncated_completions`` leave rollouts out of the
    loss: those of groups without a right answer, those that ran into ``max_completion_length``.

    Memory, without a change of the objective: ``micro_batch_prompts`` prompts share a backward pass and
    ``rollout_prompts`` a rollout (null: all of a process; noise is drawn for the prompts that are rolled out together);
    images of a rollout that is divided into micro-batches are processed and encoded once more for them;
    ``logits_chunk`` tokens have their logits at a time (null: all); ``gradient_checkpointing`` computes the decoder's
    activations again in the backward pass; ``lora`` trains adapters.

    ``attention_dtype``: of attention among kept tokens in rollouts and updates. ``float64``: on a CPU a float32 model's
    replayed log-probabilities then equal those of the rollout (with ``lora`` to 5e-6), for about half as much time
    again a step.

    ``accuracy_guard``: the policy handed back is that of the validated step which keeps the fewest tokens among those
    whose accuracy at the deployment budget is at most this much below the start's; with ``reward.target_ratio`` the
    most accurate of those where the rollouts had reached it, if there are such. ``stop_below_guard``: so many
    validations in a row below the guard end the training; 0 never.
    """

    steps: Positive = 350
    prompts_per_step: Positive = 8
    num_generations: Annotated[int, Field(ge=2)] = 8
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
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
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


class Baseline(_Section):
    """A rule at a budget that both checkpoints are evaluated with beside the deployed one: what training is worth is
    seen against what another rule or budget gives without it."""

    rule: Rule = "top_p"
    p: Budget


class EvaluateParams(_Section):
    """``workers``: processes at a time, one per checkpoint; 1 where two models do not fit the device.
    ``limit``: questions per task, the first ones; all where null.
    """

    budgets: NonEmptyUnique[Budget] = (0.94, 0.975)
    baselines: tuple[Baseline, ...] = ()
    workers: Positive = 2
    batch_size: Positive = 64
    max_new_tokens: Positive = 16
    limit: Positive | None = None


class ReportParams(_Section):
    """``kept_rows``: test questions whose kept sets are looked at in single cells. Decode time is measured at every
    grid of ``decode_grids`` (source `digits`), or on the user's longest prompts."""

    examples: NonNegative = 3
    kept_rows: Positive = 96
    decode_grids: NonEmptyUnique[Grid] = (8, 12, 24)
    decode_batch_size: Positive = 4
    decode_tokens: Annotated[int, Field(ge=2)] = 32
    decode_repetitions: Positive = 7


class TrackingParams(_Section):
    experiment: str = Field(default="sparsity-forcing", min_length=1)
    registered_model: str = Field(default="sparsity-forcing-policy", min_length=1)
    alias: str = Field(default="candidate", min_length=1)


class Params(_Section):
    """Every parameter of the pipeline."""

    preset: str = "digits"
    seed: Seed = 0
    data: DataParams = DataParams()
    model: ModelParams
    sparsity: SparsityParams = SparsityParams()
    profile: ProfileParams = ProfileParams()
    train: TrainParams = TrainParams()
    evaluate: EvaluateParams = EvaluateParams()
    report: ReportParams = ReportParams()
    tracking: TrackingParams = TrackingParams()

    @model_validator(mode="after")
    def _own_rows_need_an_own_model(self) -> Self:
        if self.data.source != "digits" and self.model.name == "scratch":
            raise ValueError(
                f"data.source {self.data.source!r} does not go with model.name 'scratch', a model that is trained on "
                "the digits alone: name a hub id or a directory below user_models/"
            )
        return self

    @model_validator(mode="after")
    def _deployment_budget_is_evaluated(self) -> Self:
        if not any(math.isclose(self.sparsity.p, p) for p in self.evaluate.budgets):
            raise ValueError(
                f"evaluate.budgets {list(self.evaluate.budgets)} must hold the deployment budget sparsity.p = "
                f"{self.sparsity.p}: the headline is measured at it"
            )
        return self

    @model_validator(mode="after")
    def _no_row_is_evaluated_twice(self) -> Self:
        rows = [(self.sparsity.rule, p) for p in self.evaluate.budgets]
        for baseline in self.evaluate.baselines:
            if (row := (baseline.rule, baseline.p)) in rows:
                raise ValueError(f"evaluate.baselines: {row[0]} at p = {row[1]} is evaluated already; name it once")
            rows.append(row)
        return self

    @model_validator(mode="after")
    def _grids_hold_what_is_drawn_on_them(self) -> Self:
        if self.data.source == "digits":
            with_shares = "drawn with the shares of data.digits, "
            self.data.digits.require_room(self.profile.grids, f"profile.grids: {with_shares}")
            self.data.digits.require_room(self.report.decode_grids, f"report.decode_grids: {with_shares}")
        return self


def load_params(path: str | Path = "params.yaml") -> Params:
    """Reads and validates a parameter file.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds keys or values that are not allowed.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist; copy one of presets/*.yaml to it") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} must hold a mapping of parameters, got {type(values).__name__}")
    return parse_params(values, source=str(path))


def parse_params(values: dict, source: str = "params") -> Params:
    """Validates a mapping of parameters; ``source`` names it in errors."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ParamsError("\n".join([f"{source} has {error.error_count()} error(s):", *_describe(error)])) from None


def _describe(error: ValidationError) -> list[str]:
    lines = []
    for issue in error.errors():
        key = ".".join(str(part) for part in issue["loc"]) or "(whole file)"
        if issue["type"] == "extra_forbidden":
            allowed = _allowed_keys(issue["loc"][:-1])
            hint = f" Allowed here: {', '.join(allowed)}." if allowed else ""
            lines.append(f"  {key}: unknown parameter (value {issue['input']!r}).{hint}")
        elif issue["type"] == "missing":
            lines.append(f"  {key}: missing.")
        else:
            value = issue["input"]
            shown = repr(value) if not isinstance(value, dict | BaseModel) else "this section"
            lines.append(f"  {key}: {issue['msg']} (got {shown}).")
    return lines


def _allowed_keys(location: tuple) -> list[str]:
    section: type[BaseModel] = Params
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = getattr(annotation, "__args__", (annotation,))[0]
    return sorted(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
