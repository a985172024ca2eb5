"""Evaluates base and policy, dense and sparse, with lmms-eval on the held-out questions.

The work is in sparsity_forcing/stages/evaluate.py, which calls sparsity_forcing/evaluation/.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.artifacts import publish_benchmark
from flows.stage import run_stage
from flows.workspace import Outcome, check_workspace


@flow(name="evaluate")
def evaluate_models(root: Path = Path(".")) -> Outcome:
    """Stage `evaluate` alone, with the outputs of earlier stages as they are."""
    check_workspace(root)
    return evaluate(root)


def evaluate(root: Path) -> Outcome:
    outcome = run_stage("evaluate", root)
    publish_benchmark(root)
    return outcome


if __name__ == "__main__":
    evaluate_models()
