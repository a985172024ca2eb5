"""Prepares the data: the source's rows in one schema, split, checked, bad ones in quarantine.

The work is in sparsity_forcing/stages/prepare.py, which calls sparsity_forcing/data/.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.stage import run_stage
from flows.workspace import Outcome, check_workspace


@flow(name="prepare-data")
def prepare_data(root: Path = Path(".")) -> Outcome:
    """Stage `prepare` alone, with the outputs of earlier stages as they are."""
    check_workspace(root)
    return prepare(root)


def prepare(root: Path) -> Outcome:
    return run_stage("prepare", root)


if __name__ == "__main__":
    prepare_data()
