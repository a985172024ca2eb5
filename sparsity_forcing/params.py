"""params.yaml as validated types.

One file holds every parameter of the pipeline. A preset is such a file (``presets/``). What is left out has the default
written here; what is unknown, out of range or contradictory is an error that names the key, the value and what is
allowed, before anything runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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


class ParamsError(ValueError):
    """A parameter file is not usable; the message names every key at fault, its value and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class SparsityParams(_Section):
    """How a layer selects its kept set (design: budget p, scoring rows, prefill kind)."""

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
    probe_seed: NonNegative = 0
    impl: Impl = "auto"


def _require_room(grids: tuple[int, ...], coloured: int, grey_share: float, clutter_share: float) -> None:
    """A canvas holds its coloured and grey digits and its clutter."""
    for grid in grids:
        cells = grid * grid
        taken = coloured + round(grey_share * cells) + round(clutter_share * cells)
        if taken > cells:
            raise ValueError(
                f"a {grid}x{grid} grid has {cells} cells, too few for {taken}: {coloured} coloured digits, "
                f"grey_share {grey_share} and clutter_share {clutter_share}; lower a share or take a larger grid"
            )


class DigitsParams(_Section):
    """The embedded source: splits of rendered questions, the same share of every task and grid."""

    grids: tuple[Annotated[int, Field(ge=3, le=64)], ...] = (8, 12)
    tasks: tuple[Literal["read", "count", "sum"], ...] = ("read", "count", "sum")
    train_rows: Positive = 4096
    validation_rows: Positive = 384
    test_rows: Positive = 2400
    grey_share: Share = 0.1
    clutter_share: Share = 0.16

    @field_validator("grids", "tasks")
    @classmethod
    def _not_empty(cls, value: tuple) -> tuple:
        if not value or len(set(value)) != len(value):
            raise ValueError("needs at least one entry and no entry twice")
        return value

    @model_validator(mode="after")
    def _room_for_coloured_digits(self) -> Self:
        _require_room(self.grids, 4, self.grey_share, self.clutter_share)
        return self


class UserDataParams(_Section):
    """The user's own rows: one file, split by a seeded hash of the row id unless the rows name their split.

    ``tasks``: the task names that are allowed; empty allows any. A video gives at most ``max_video_frames`` images.
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
        return self


class Phase(_Section):
    """One phase of the curriculum: a mixture of grids and tasks, trained for some steps."""

    steps: Positive
    batch_size: Positive = 32
    grids: tuple[Annotated[int, Field(ge=3, le=64)], ...] = (8,)
    tasks: tuple[Literal["read", "count", "sum"], ...] = ("read", "count", "sum")
    grey_share: Share = 0.1
    clutter_share: Share = 0.16
    coloured: Annotated[int, Field(ge=2)] = 4

    @model_validator(mode="after")
    def _room_for_coloured_digits(self) -> Self:
        _require_room(self.grids, self.coloured, self.grey_share, self.clutter_share)
        return self


class ModelParams(_Section):
    """``name``: `scratch`, a hub id or a local `save_pretrained` directory."""

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


class ProfileParams(_Section):
    """``rows``: questions per setting. ``grids`` are the prompt lengths of the digits source; the user's own rows are
    taken in thirds by length.
    """

    budgets: tuple[Budget, ...] = (0.5, 0.7, 0.8, 0.9, 0.94, 0.975, 1.0)
    scoring_rows: tuple[ScoringRows, ...] = ("text", "probe", "all")
    grids: tuple[Annotated[int, Field(ge=3, le=64)], ...] = (6, 8, 12)
    rows: Positive = 96
    batch_size: Positive = 48
    max_new_tokens: Positive = 16


class RewardParams(_Section):
    """r = correct + C * (1 - tau); ``correct`` is a reward by name or ``module:function``."""

    correct: str = Field(default="exact_match", min_length=1)
    weight_efficiency: NonNegativeFloat = 1.0


class SelectionPolicyParams(_Section):
    """The stochastic selection term. ``sigma`` 0 is the literal objective of the paper.

    ``credit``: what judges a layer's selection. ``joint``: the rollout's reward, as its tokens are. ``layer``: the
    same reward with the layer's own ratio in the place of the mean over layers, so that a layer is not paid for what
    the others drew.
    """

    sigma: NonNegativeFloat = 0.5
    weight: NonNegativeFloat = 0.01
    credit: Literal["layer", "joint"] = "layer"


class TrainParams(_Section):
    """The GRPO stage; names follow TRL where it has one.

    ``accuracy_guard``: the policy handed back is that of the validated step which keeps the fewest tokens among those
    whose accuracy at the deployment budget is at most this much below the start's.
    """

    steps: Positive = 350
    prompts_per_step: Positive = 8
    num_generations: Annotated[int, Field(ge=2)] = 8
    budgets: tuple[Budget, ...] = (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975)
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
    temperature: PositiveFloat = 1.0
    max_completion_length: Positive = 16
    reward: RewardParams = RewardParams()
    selection_policy: SelectionPolicyParams = SelectionPolicyParams()
    freeze_vision: bool = True
    checkpoint_every: Positive = 50
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    validate_every: Positive = 25
    validation_rows: Positive = 384
    accuracy_guard: Share = 0.01
    log_samples_every: Positive = 50

    @model_validator(mode="after")
    def _one_budget_per_rollout(self) -> Self:
        if self.num_generations % len(self.budgets):
            raise ValueError(
                f"num_generations ({self.num_generations}) must be a multiple of the number of budgets "
                f"({len(self.budgets)}): every rollout of a group has a budget of its own turn"
            )
        return self


class EvaluateParams(_Section):
    """``workers``: processes at a time, one per checkpoint; 1 where two models do not fit the device.
    ``limit``: questions per task, the first ones; all where null.
    """

    budgets: tuple[Budget, ...] = (0.94, 0.975)
    workers: Positive = 2
    batch_size: Positive = 64
    max_new_tokens: Positive = 16
    limit: Positive | None = None


class ReportParams(_Section):
    """``kept_rows``: test questions whose kept sets are looked at in single cells. Decode time is measured at every
    grid of ``decode_grids`` (source `digits`), or on the user's longest prompts."""

    examples: NonNegative = 3
    kept_rows: Positive = 96
    decode_grids: tuple[Annotated[int, Field(ge=3, le=64)], ...] = (8, 12, 24)
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
    seed: NonNegative = 0
    data: DataParams = DataParams()
    model: ModelParams
    sparsity: SparsityParams = SparsityParams()
    profile: ProfileParams = ProfileParams()
    train: TrainParams = TrainParams()
    evaluate: EvaluateParams = EvaluateParams()
    report: ReportParams = ReportParams()
    tracking: TrackingParams = TrackingParams()

    @model_validator(mode="after")
    def _deployment_budget_is_evaluated(self) -> Self:
        if not any(math.isclose(self.sparsity.p, p) for p in self.evaluate.budgets):
            raise ValueError(
                f"evaluate.budgets {list(self.evaluate.budgets)} must hold the deployment budget sparsity.p = "
                f"{self.sparsity.p}: the headline is measured at it"
            )
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
