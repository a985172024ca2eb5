"""Provides the base model: a hub id or directory as it is, or a small model trained from scratch.

The work is in sparsity_forcing/stages/base.py, which calls sparsity_forcing/models/.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.stage import run_stage
from flows.workspace import Outcome, check_workspace


@flow(name="base-model")
def base_model(root: Path = Path(".")) -> Outcome:
    """Stage `base` alone, with the outputs of earlier stages as they are."""
    check_workspace(root)
    return base(root)


def base(root: Path) -> Outcome:
    return run_stage("base", root)


if __name__ == "__main__":
    base_model()
