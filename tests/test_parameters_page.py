"""docs/parameters.md names parameters that exist, with the defaults that they have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsity_forcing.params import LoraParams, Params, SparsityParams, TrainParams, load_params

ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (Path(__file__).parents[1] / "docs/parameters.md").read_text().splitlines()
    if line.startswith("|")
][2:]


SMALL = load_params(Path(__file__).parents[1] / "params.yaml")


def value_of(key: str, sparsity: SparsityParams, train: TrainParams):
    section, *path = key.split(".")
    value = {"sparsity": sparsity, "train": train}[section]
    assert section in Params.model_fields
    for name in path:
        assert name in type(value).model_fields, key
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("quantity, keys, published, written, small", ROWS, ids=[row[0] for row in ROWS])
def test_every_parameter_exists_with_its_default(quantity, keys, published, written, small):
    values = [value_of(key, SparsityParams(), TrainParams()) for key in re.findall(r"`([a-z_.]+)`", keys)]
    assert values
    assert published
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", written)]
    names = re.findall(r"`(\w+)`", written)
    assert numbers == [value for value in values if isinstance(value, float | int) and not isinstance(value, bool)] or (
        written in ("the same", "all", "yes")
    )
    assert set(names) <= {value for value in values if isinstance(value, str)}


@pytest.mark.parametrize("quantity, keys, published, written, small", ROWS, ids=[row[0] for row in ROWS])
def test_what_params_yaml_sets_is_told_where_it_differs(quantity, keys, published, written, small):
    differs = []
    for key in re.findall(r"`([a-z_.]+)`", keys):
        value = value_of(key, SMALL.sparsity, SMALL.train)
        if value != value_of(key, SparsityParams(), TrainParams()):
            differs += [value.r, value.alpha, *value.targets] if isinstance(value, LoraParams) else [value]
    told = re.findall(r"`(\w+)`|(\d+(?:\.\d+)?(?:e-\d+)?)", small)
    assert [name or float(number) for name, number in told] == differs
    assert (small == "–") == (not differs)


def test_what_is_the_same_as_in_the_paper_is():
    train = TrainParams()
    assert train.budgets == (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975)
    assert (train.reward.efficiency, train.reward.weight_efficiency) == ("token_ratio", 1.0)
    assert train.lora is None
    assert train.freeze_vision
    assert SparsityParams().protect_text
