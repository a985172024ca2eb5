"""One small model directory for all tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_families import build_family


@pytest.fixture(scope="session")
def _saved_model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model, processor = build_family("qwen2_5_vl")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def model_directory(_saved_model, tmp_path) -> Path:
    """A fresh copy of a whole two-layer model, to break as the test likes."""
    return Path(shutil.copytree(_saved_model, tmp_path / "model"))


@pytest.fixture
def one_thread():
    """The same sums in the same order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
