"""`dvc repro` alone and the flow do the same: they leave the same dvc.lock."""

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
def test_dvc_alone_and_the_flow_leave_the_same_lock(smoke_workspace, tmp_path, migrated_store, prefect_environment):
    run("dvc", "repro", root=smoke_workspace, environment=prefect_environment)
    before = locked(smoke_workspace)
    assert tuple(before) == STAGES
    said = run("flows.pipeline", root=smoke_workspace, environment=prefect_environment)
    assert "Everything is up to date: nothing was run." in said
    assert locked(smoke_workspace) == before

    by_flow = tmp_path / "by-flow"
    copy_workspace(ROOT, by_flow, "smoke")
    shutil.copy(migrated_store, by_flow / "mlflow.db")
    said = run("flows.pipeline", "prepare", root=by_flow, environment=prefect_environment)
    assert "Running stage 'prepare'" in said
    assert locked(by_flow) == {"prepare": before["prepare"]}
    assert "up to date" in run("dvc", "status", "prepare", root=by_flow, environment=prefect_environment)
    said = run("flows.pipeline", "prepare", root=by_flow, environment=prefect_environment)
    assert "Running stage" not in said
    assert locked(by_flow) == {"prepare": before["prepare"]}
