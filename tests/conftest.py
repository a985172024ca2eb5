"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from sparsity_forcing.__main__ import common_rounding
from sparsity_forcing.torchvision_ops import declare_missing_ops

if not torch.cuda.is_available():  # before anything imports triton: its kernels run on the CPU then
    os.environ["TRITON_INTERPRET"] = "1"
for name, value in common_rounding().items():  # before torch computes anything: tests round as the stages' processes do
    os.environ.setdefault(name, value)
declare_missing_ops()  # tests import transformers' classes directly, some of which need torchvision
# The same examples on every run, and no time limit for a busy machine to miss.
settings.register_profile("tests", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _own_tracking(monkeypatch):
    """No test writes into a tracking server that the developer's shell points at."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory) -> Path:
    """An empty MLflow SQLite file. Its first use pays some 20 s of migrations, so all test processes share them."""
    from mlflow import MlflowClient

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one directory per process: theirs is the one above
        shared = shared.parent
    path = shared / "migrated.db"
    with FileLock(shared / "migrated.lock"):
        if not path.exists():
            MlflowClient(tracking_uri=f"sqlite:///{shared / 'new.db'}").search_experiments()
            shutil.copy(shared / "new.db", path)
    return path


@pytest.fixture
def workspace(tmp_path, migrated_store) -> Path:
    """An empty workspace whose MLflow store is ready: `Tracker(params, workspace)` writes into it."""
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="session")
def tiny():
    """(model, processor): two layers, float64, attention far from uniform."""
    from tiny_prompts import sharp_model

    return sharp_model()
