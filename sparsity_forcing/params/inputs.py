"""The sections `data` and `model`: what a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from sparsity_forcing.params.fields import (
    AtLeastTwo,
    Grid,
    Name,
    NonEmptyUnique,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    Share,
    Task,
)

COLOURED_DIGITS = 4  # on a canvas of the digits source


class Canvas(Section):
    """What the questions of the digits source are drawn on, and which are asked."""

    grids: NonEmptyUnique[Grid] = (8,)
    tasks: NonEmptyUnique[Task] = ("read", "count", "sum")
    grey_share: Share = 0.1
    clutter_share: Share = 0.16

    def require_room(self, grids: tuple[int, ...], coloured: int = COLOURED_DIGITS, what: str = "") -> None:
        """Raises ValueError, opening with ``what``, unless a canvas of each of ``grids`` holds what is drawn on it."""
        for grid in grids:
            cells = grid * grid
            taken = coloured + round(self.grey_share * cells) + round(self.clutter_share * cells)
            if taken > cells:
                raise ValueError(
                    f"{what}a {grid}x{grid} grid has {cells} cells, too few for {taken}: {coloured} coloured digits, "
                    f"grey_share {self.grey_share} and clutter_share {self.clutter_share}; lower a share or take a "
                    "larger grid"
                )


class DigitsParams(Canvas):
    """The embedded source: splits of rendered questions, the same share of every task and grid.

    ``distorted``: the scans of the training questions go through `data.digits.distort`; those of other splits never do.
    """

    grids: NonEmptyUnique[Grid] = (8, 12)
    train_rows: Positive = 4096
    validation_rows: Positive = 384
    test_rows: Positive = 2400
    distorted: bool = False

    @model_validator(mode="after")
    def _room_for_coloured_digits(self) -> Self:
        self.require_room(self.grids)
        return self


class UserDataParams(Section):
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


class DataParams(Section):
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


class ScratchModel(Section):
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


class Phase(Canvas):
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
    coloured: AtLeastTwo = COLOURED_DIGITS

    @model_validator(mode="after")
    def _open_ended_up_to_a_limit(self) -> Self:
        if (self.until is None) != (self.at_most is None):
            raise ValueError("until and at_most go together: the share to reach, and the steps it may take")
        if self.at_most is not None and self.at_most < self.steps:
            raise ValueError(f"at_most ({self.at_most}) must be at least steps ({self.steps})")
        return self

    @model_validator(mode="after")
    def _room_for_coloured_digits(self) -> Self:
        self.require_room(self.grids, self.coloured)
        return self


class ModelParams(Section):
    """``name``: `scratch`, a hub id, or a `save_pretrained` directory below user_models/, the folder that DVC watches.

    The model trained from scratch is validated on the grids, tasks and shares of the last phase of its curriculum.
    """

    name: Name = "scratch"
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
        total, end = sum(phase.steps for phase in self.curriculum), 0
        for number, phase in enumerate(self.curriculum, start=1):
            end += phase.steps
            if phase.until is not None and end > total // 2:
                raise ValueError(
                    f"phase {number} of the curriculum ends at step {end} of {total}, when the learning rate falls: "
                    "until and at_most are for phases in the first half"
                )
        return self

    @model_validator(mode="after")
    def _last_phase_can_be_validated(self) -> Self:
        if self.name == "scratch":
            last = self.curriculum[-1]
            what = "the model is validated on the last phase of the curriculum, with all coloured digits: "
            last.require_room(last.grids, what=what)
        return self
