"""Profiles the base model: token ratio and accuracy against budget, layer, prompt length, scoring rows.

The work is in sparsity_forcing/stages/profile.py, which calls sparsity_forcing/evaluation/.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.stage import run_stage
from flows.workspace import Outcome, check_workspace


@flow(name="profile-sparsity")
def profile_sparsity(root: Path = Path(".")) -> Outcome:
    """Stage `profile` alone, with the outputs of earlier stages as they are."""
    check_workspace(root)
    return profile(root)


def profile(root: Path) -> Outcome:
    return run_stage("profile", root)


if __name__ == "__main__":
    profile_sparsity()
