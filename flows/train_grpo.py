"""Trains the policy: GRPO with one budget per rollout. Stopped at any point, it goes on from its checkpoint.

The work is in sparsity_forcing/stages/train.py, which calls sparsity_forcing/rl/.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.stage import run_stage
from flows.workspace import Outcome, check_workspace


@flow(name="train-grpo")
def train_grpo(root: Path = Path(".")) -> Outcome:
    """Stage `train` alone, with the outputs of earlier stages as they are."""
    check_workspace(root)
    return train(root)


def train(root: Path) -> Outcome:
    return run_stage("train", root)


if __name__ == "__main__":
    train_grpo()
