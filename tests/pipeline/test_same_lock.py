"""The flow and `dvc repro` alone do the same: every stage by each, and the other finds nothing left to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


def model_of(stages: dict, stage: str) -> dict:
    (model,) = (out for out in stages[stage]["outs"] if out["path"].startswith("models/"))
    return model


def scratch(target: Path, store: Path, environment: dict[str, str]) -> Path:
    """What `make smoke` runs in, with an MLflow store that is ready."""
    run("flows.scratch", str(target), "--preset", "smoke", root=ROOT, environment=environment)
    shutil.copy(store, target / "mlflow.db")
    return target


@pytest.mark.slow
def test_the_flow_and_dvc_alone_leave_the_same_lock(tmp_path, migrated_store, prefect_environment):
    by_flow = scratch(tmp_path / "by-flow", migrated_store, prefect_environment)
    said = run("flows.pipeline", "prepare", root=by_flow, environment=prefect_environment)
    assert "Running stage 'prepare'" in said
    assert tuple(locked(by_flow)) == ("prepare",)
    assert "up to date" in run("dvc", "status", "prepare", root=by_flow, environment=prefect_environment)
    said = run("flows.pipeline", root=by_flow, environment=prefect_environment)
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in said] == [*STAGES[1:]]
    assert str(by_flow / "reports/index.html") in said
    flow_locked = locked(by_flow)
    assert tuple(flow_locked) == STAGES
    assert "up to date" in run("dvc", "repro", root=by_flow, environment=prefect_environment)
    assert locked(by_flow) == flow_locked

    by_dvc = scratch(tmp_path / "by-dvc", migrated_store, prefect_environment)
    run("dvc", "repro", root=by_dvc, environment=prefect_environment)
    dvc_locked = locked(by_dvc)
    assert tuple(dvc_locked) == STAGES
    said = run("flows.pipeline", root=by_dvc, environment=prefect_environment)
    assert "Everything is up to date: nothing was run." in said
    assert locked(by_dvc) == dvc_locked

    assert dvc_locked["prepare"] == flow_locked["prepare"]  # what later stages measure holds seconds
    assert all(model_of(dvc_locked, stage) == model_of(flow_locked, stage) for stage in ("base", "train"))
