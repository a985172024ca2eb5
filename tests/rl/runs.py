"""Small training runs: what they are made of, and what of them can be compared."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_prompts import sharp_model

from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import Row
from sparsity_forcing.params import DigitsParams, SparsityParams, TrainParams
from sparsity_forcing.rl.trainer import Trainer

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
    directory: Path,
    recorder=None,
    train=None,
    sparsity=SPARSITY,
    identity="abc",
    family="qwen2_5_vl",
    dtype=torch.float32,
    **changes,
) -> Trainer:
    model, processor = sharp_model(family, dtype=dtype)
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
    """The history without what a clock says, and the memory that a process took."""
    clocks = ("seconds", "per_second", "peak_memory")
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
