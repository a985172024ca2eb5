"""docs/parameters.md names parameters that exist, with the defaults that they have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsity_forcing.params import Params, SparsityParams, TrainParams

ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (Path(__file__).parents[1] / "docs/parameters.md").read_text().splitlines()
    if line.startswith("|")
][2:]


def default(key: str):
    section, *path = key.split(".")
    value = {"sparsity": SparsityParams(), "train": TrainParams()}[section]
    assert section in Params.model_fields
    for name in path:
        assert name in type(value).model_fields, key
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("quantity, keys, published, written", ROWS, ids=[row[0] for row in ROWS])
def test_every_parameter_exists_with_its_default(quantity, keys, published, written):
    values = [default(key) for key in re.findall(r"`([a-z_.]+)`", keys)]
    assert values
    assert published
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", written)]
    names = re.findall(r"`(\w+)`", written)
    assert numbers == [value for value in values if isinstance(value, float | int) and not isinstance(value, bool)] or (
        written in ("the same", "all", "yes")
    )
    assert set(names) <= {value for value in values if isinstance(value, str)}


def test_what_is_the_same_as_in_the_paper_is():
    train = TrainParams()
    assert train.budgets == (0.94, 0.945, 0.95, 0.955, 0.96, 0.965, 0.97, 0.975)
    assert (train.reward.cost, train.reward.weight_efficiency) == ("token_ratio", 1.0)
    assert train.lora is None
    assert train.freeze_vision
    assert SparsityParams().protect_text
