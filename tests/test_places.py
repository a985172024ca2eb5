"""The user is told which of the own files DVC does not see, and a model inside an output is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsity_forcing.params import Params, ParamsError, parse_params
from sparsity_forcing.places import require_places


@pytest.fixture
def root(tmp_path) -> Path:
    for folder in ("user_data", "user_models/mine", "models/base", "elsewhere"):
        (tmp_path / "workspace" / folder).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "workspace/user_models/linked").symlink_to(tmp_path / "outside")
    return tmp_path / "workspace"


def named(rows: str | None = None, model: str = "org/hub-model", score: str = "exact_match") -> Params:
    data = {"source": "chat_jsonl", "user": {"path": rows}} if rows else {}
    return parse_params({"data": data, "model": {"name": model}, "train": {"reward": {"correct": score}}})


@pytest.mark.parametrize(
    "values",
    [
        {"rows": "user_data/rows.jsonl"},
        {"rows": "./user_data/deep/rows.jsonl"},
        {"model": "user_models/mine"},
        {"model": "org/not-here"},
        {"score": "anls"},
        {"score": "user_code.scores:mine"},
    ],
)
def test_what_dvc_sees_is_taken(root, values, monkeypatch):
    assert require_places(named(**values), root) == []
    monkeypatch.chdir(root)
    assert require_places(named(**values), Path(".")) == []


def test_an_absolute_path_into_the_folder_is_taken(root):
    params = named(rows=str(root / "user_data/rows.jsonl"), model=str(root / "user_models/mine"))
    assert require_places(params, root) == []


@pytest.mark.parametrize(
    "values, words",
    [
        ({"rows": "rows.jsonl"}, ["data.user.path 'rows.jsonl' is outside user_data/", "--force prepare"]),
        ({"rows": "user_data/../rows.jsonl"}, ["outside user_data/"]),
        ({"rows": "/tmp/rows.jsonl"}, ["outside user_data/"]),
        ({"model": "elsewhere"}, ["model.name 'elsewhere' is outside user_models/", "--force base"]),
        ({"model": ".."}, ["outside user_models/"]),
        ({"model": "user_models/linked"}, ["outside user_models/"]),
        (
            {"score": "scores:mine"},
            ["train.reward.correct 'scores:mine' is outside user_code/", "profile train evaluate"],
        ),
    ],
)
def test_what_dvc_does_not_see_is_told(root, values, words):
    (told,) = require_places(named(**values), root)
    assert all(word in told for word in words)


@pytest.mark.parametrize("model", ["models/base", "models/policy", "./checkpoints/../models/base"])
def test_a_model_inside_an_output_is_refused(root, model):
    with pytest.raises(ParamsError, match=r"is inside models/, which the pipeline writes"):
        require_places(named(model=model), root)
