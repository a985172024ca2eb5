"""Scratch workspaces for the flows: copies of this one, and toy ones whose stages are shell commands."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.scratch import copy_workspace

ROOT = Path(__file__).parents[2]
PREFECT_SETTINGS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


@pytest.fixture
def smoke_workspace(tmp_path, migrated_store) -> Path:
    """The whole workspace with the smoke preset, and nothing run yet."""
    target = tmp_path / "workspace"
    copy_workspace(ROOT, target, "smoke")
    shutil.copy(migrated_store, target / "mlflow.db")
    return target


@pytest.fixture
def toy_workspace(tmp_path) -> Callable[[str], Path]:
    """Makes a workspace whose stage `prepare` is a shell command that should write `out`."""

    def make(command: str) -> Path:
        shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=lambda *_: ["tmp", "cache", "config.local"])
        shutil.copy(ROOT / "presets" / "smoke.yaml", tmp_path / "params.yaml")
        (tmp_path / "command.sh").write_text(command)
        (tmp_path / "dvc.yaml").write_text(
            "stages:\n  prepare:\n    cmd: exec sh command.sh\n    params: [seed]\n    outs: [out]\n"
        )
        return tmp_path

    return make


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def prefect_environment(prefect_home) -> dict[str, str]:
    """For Prefect processes: a home of their own and no server but the one a test starts."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return inherited | PREFECT_SETTINGS | {"PREFECT_HOME": str(prefect_home)}
