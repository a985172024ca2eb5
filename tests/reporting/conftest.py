"""A small workspace for the report: made-up metrics, real rows, real models with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_workspace import LAYERS, digit_rows, write_metrics

from sparsity_forcing.data.digits import corpus
from sparsity_forcing.models.tiny import build_model, build_processor
from sparsity_forcing.params import Params, ScratchModel, parse_params


@pytest.fixture(scope="session")
def report_params() -> Params:
    return parse_params(
        {
            "preset": "test",
            "data": {"digits": {"grids": [6], "test_rows": 6}},
            "model": {"scratch": {"layers": LAYERS}, "curriculum": [{"steps": 1}]},
            "evaluate": {"max_new_tokens": 4},
            "report": {
                "examples": 2,
                "kept_rows": 3,
                "decode_grids": [4, 10],
                "decode_tokens": 3,
                "decode_batch_size": 2,
                "decode_repetitions": 2,
            },
        }
    )


@pytest.fixture(scope="session")
def processor():
    return build_processor(corpus())


@pytest.fixture(scope="session")
def model(processor):
    return build_model(ScratchModel(layers=LAYERS), processor.tokenizer, seed=0).eval()


@pytest.fixture(scope="session")
def report_models(tmp_path_factory, processor) -> Path:
    """models/base and models/policy with different random weights."""
    folder = tmp_path_factory.mktemp("report") / "models"
    for seed, name in enumerate(("base", "policy")):
        build_model(ScratchModel(layers=LAYERS), processor.tokenizer, seed).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def unchanged_root(tmp_path_factory, report_models) -> Path:
    """As `report_root`, for tests that only read."""
    root = tmp_path_factory.mktemp("workspace")
    write_metrics(root, digit_rows(10))
    (root / "models").symlink_to(report_models)
    return root


@pytest.fixture
def report_root(tmp_path, report_models) -> Path:
    """A workspace in which every stage before the report has run."""
    write_metrics(tmp_path, digit_rows(10))
    (tmp_path / "models").symlink_to(report_models)
    return tmp_path
