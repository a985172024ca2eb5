"""The flow and `dvc repro` alone do the same: they leave the same dvc.lock. The flow runs every stage here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.scratch import copy_workspace
from sparsity_forcing.stages import STAGES

ROOT = Path(__file__).parents[2]


def run(*command: str, root: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def locked(root: Path) -> dict:
    return yaml.safe_load((root / "dvc.lock").read_text())["stages"]


@pytest.mark.slow
def test_the_flow_and_dvc_alone_leave_the_same_lock(smoke_workspace, tmp_path, migrated_store, prefect_environment):
    said = run("flows.pipeline", root=smoke_workspace, environment=prefect_environment)
    assert all(f"Running stage '{stage}'" in said for stage in STAGES)
    assert str(smoke_workspace / "reports/index.html") in said
    by_flow = locked(smoke_workspace)
    assert tuple(by_flow) == STAGES
    assert "up to date" in run("dvc", "repro", root=smoke_workspace, environment=prefect_environment)
    assert locked(smoke_workspace) == by_flow

    by_dvc = tmp_path / "by-dvc"
    copy_workspace(ROOT, by_dvc, "smoke")
    shutil.copy(migrated_store, by_dvc / "mlflow.db")
    run("dvc", "repro", "prepare", root=by_dvc, environment=prefect_environment)
    assert locked(by_dvc) == {"prepare": by_flow["prepare"]}
    said = run("flows.pipeline", "prepare", root=by_dvc, environment=prefect_environment)
    assert "Running stage" not in said
    assert locked(by_dvc) == {"prepare": by_flow["prepare"]}
