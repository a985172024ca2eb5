"""Measures decode time and cache size, and writes the report.

The work is in sparsity_forcing/stages/report.py, which calls sparsity_forcing/reporting/.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from flows.artifacts import publish_report
from flows.stage import run_stage
from flows.workspace import Outcome, check_workspace
from sparsity_forcing.params import load_params


@flow(name="efficiency-report")
def efficiency_report(root: Path = Path(".")) -> Outcome:
    """Stage `report` alone, with the outputs of earlier stages as they are."""
    check_workspace(root)
    return report(root)


def report(root: Path) -> Outcome:
    outcome = run_stage("report", root)
    publish_report(load_params(root / "params.yaml"), root)
    return outcome


if __name__ == "__main__":
    efficiency_report()
