"""params.yaml and its presets: everything wrong is named, with its value and what is allowed, before anything runs."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import pytest
import torch
import yaml

from sparsity_forcing.data.digits import corpus
from sparsity_forcing.models.tiny import build_model, build_processor
from sparsity_forcing.params import Params, ParamsError, load_params, parse_params

ROOT = Path(__file__).parents[1]
# A phase that holds two coloured digits but not the four of the validation; shares that a 3x3 grid does not hold.
TIGHT = {"steps": 1, "grids": [3], "coloured": 2, "grey_share": 0.33, "clutter_share": 0.33}
CROWDED = {"source": "digits", "digits": {"grids": [8], "grey_share": 0.4, "clutter_share": 0.4}}
PRESETS = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


def smoke(**sections: dict) -> dict:
    """The smoke preset with some keys of some sections replaced."""
    values = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text())
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys if isinstance(keys, dict) else keys
    return values


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid_and_whole(path):
    params = load_params(path)
    given = yaml.safe_load(path.read_text())
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name in {name for stage in stages.values() for name in stage["params"]}:
        assert reduce(lambda section, key: section.get(key, {}), name.split("."), given) != {}, f"DVC needs {name}"
    assert path.stem in {params.preset, "params"}


def test_the_paper_preset_has_the_settings_of_the_paper():
    params = load_params(ROOT / "presets" / "qwen2.5-vl-7b.yaml")
    assert params.model.name == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert params.train.budgets == (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975)
    assert (params.train.num_generations, params.sparsity.p) == (8, 0.975)


def test_the_gpu_preset_has_long_prompts_and_a_model_to_match():
    params = load_params(ROOT / "presets" / "digits-gpu.yaml")
    assert min(params.data.digits.grids) ** 2 >= 1024
    assert set(params.data.digits.grids) == set(params.model.curriculum[-1].grids)
    assert params.data.digits.test_rows >= 5000
    with torch.device("meta"):
        model = build_model(params.model.scratch, build_processor(corpus()).tokenizer, seed=0)
    assert 30e6 < sum(weight.numel() for weight in model.parameters()) < 50e6


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"sparsity": {"q": 0.5}}, ["sparsity.q", "unknown parameter", "0.5", "Allowed here", "prefill"]),
        ({"speed": {"fast": True}}, ["speed", "unknown parameter", "sparsity"]),
        ({"train": {"reward": {"corect": "x"}}}, ["train.reward.corect", "unknown parameter", "correct"]),
        ({"model": {"curriculum": [{"stepz": 1}]}}, ["model.curriculum.0.stepz", "unknown parameter", "steps"]),
        ({"sparsity": {"p": 0.0}}, ["sparsity.p", "greater than 0", "0.0"]),
        ({"sparsity": {"p": 1.5}}, ["sparsity.p", "less than or equal to 1", "1.5"]),
        ({"sparsity": {"p": float("nan")}}, ["sparsity.p", "finite", "nan"]),
        ({"train": {"budgets": [0.9, -0.1]}}, ["train.budgets.1", "greater than 0", "-0.1"]),
        ({"train": {"learning_rate": float("inf")}}, ["train.learning_rate", "finite", "inf"]),
        ({"train": {"steps": "many"}}, ["train.steps", "integer", "'many'"]),
        ({"train": {"num_generations": 3}}, ["train", "num_generations (3)", "multiple"]),
        ({"evaluate": {"budgets": [0.5]}}, ["evaluate.budgets", "sparsity.p = 0.975"]),
        ({"data": {"source": "chat_jsonl"}}, ["data", "user.path"]),
        (
            {"data": {"source": "chat_jsonl", "user": {"path": "user_data/rows.jsonl"}}},
            ["'chat_jsonl' does not go with model.name 'scratch'", "user_models/"],
        ),
        ({"data": {"source": "imagenet"}}, ["data.source", "'digits'", "'chat_jsonl'", "'imagenet'"]),
        ({"data": {"digits": {"tasks": []}}}, ["data.digits.tasks", "at least one"]),
        ({"model": {"name": "scratch", "curriculum": []}}, ["model", "curriculum"]),
        ({"model": {"scratch": {"hidden_size": 60}}}, ["model.scratch", "multiple of 16", "60"]),
        ({"model": None}, ["model"]),
        ({"model": {"scratch": {"vision_hidden_size": 50}}}, ["model.scratch", "vision_hidden_size", "multiple", "50"]),
        ({"model": {"curriculum": [{"steps": 1, "grids": []}]}}, ["model.curriculum.0.grids", "at least one"]),
        ({"model": {"curriculum": [{"steps": 1, "tasks": []}]}}, ["model.curriculum.0.tasks", "at least one"]),
        ({"model": {"curriculum": [{"steps": 1, "grids": [8, 8]}]}}, ["model.curriculum.0.grids", "no entry twice"]),
        ({"model": {"curriculum": [TIGHT]}}, ["validated on the last phase", "3x3 grid has 9 cells, too few for 10"]),
        ({"profile": {"budgets": []}}, ["profile.budgets", "at least one", "[]"]),
        ({"profile": {"budgets": [0.5, 0.5]}}, ["profile.budgets", "no entry twice"]),
        ({"profile": {"grids": []}}, ["profile.grids", "at least one"]),
        ({"profile": {"scoring_rows": ["all", "all"]}}, ["profile.scoring_rows", "no entry twice"]),
        ({"evaluate": {"budgets": [0.975, 0.975]}}, ["evaluate.budgets", "no entry twice"]),
        ({"evaluate": {"baselines": [{"p": 0.975}]}}, ["evaluate.baselines", "top_p at p = 0.975", "once"]),
        ({"train": {"budgets": []}}, ["train.budgets", "at least one"]),
        ({"report": {"decode_grids": []}}, ["report.decode_grids", "at least one"]),
        ({"profile": {"grids": [3]}, "data": CROWDED}, ["profile.grids: ", "data.digits", "3x3 grid has 9 cells"]),
        ({"report": {"decode_grids": [3]}, "data": CROWDED}, ["report.decode_grids: ", "3x3 grid has 9 cells"]),
        ({"seed": 2**32}, ["seed", "less than 4294967296"]),
        ({"sparsity": {"probe_seed": 10**11}}, ["sparsity.probe_seed", "less than 4294967296"]),
    ],
)
def test_a_wrong_parameter_is_named_with_its_value_and_what_is_allowed(sections, words):
    with pytest.raises(ParamsError) as caught:
        parse_params(smoke(**sections), source="params.yaml")
    message = str(caught.value)
    assert message.startswith("params.yaml has")
    for word in words:
        assert word in message


def test_the_grids_of_the_digits_do_not_bind_the_users_own_rows():
    rows = {"source": "parquet", "user": {"path": "user_data/rows.parquet"}, "digits": CROWDED["digits"]}
    assert parse_params(smoke(profile={"grids": [3]}, data=rows, model={"name": "org/model"})).profile.grids == (3,)


def test_all_errors_are_told_at_once():
    with pytest.raises(ParamsError, match="2 error") as caught:
        parse_params(smoke(sparsity={"p": 2}, train={"steps": 0}))
    assert "sparsity.p" in str(caught.value)
    assert "train.steps" in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [("a: [1", "not valid YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping"), (None, "copy one of")],
)
def test_a_file_that_is_no_parameter_file_is_named(tmp_path, text, words):
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ParamsError, match=words) as caught:
        load_params(path)
    assert str(path) in str(caught.value)


def test_parameters_cannot_be_changed_after_they_were_checked():
    params = parse_params(smoke())
    with pytest.raises(ValueError, match="frozen"):
        params.sparsity.p = 2.0
    assert isinstance(params, Params)
