"""The profile: its tables against direct measurement, its stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from killed import kill_stage

from sparsity_forcing import sparse_attention
from sparsity_forcing.data.digits import SPLITS
from sparsity_forcing.data.schema import write_rows
from sparsity_forcing.evaluation.intervals import wilson_interval
from sparsity_forcing.evaluation.profile import (
    ProfileError,
    Setting,
    digits_lengths,
    settings_to_profile,
    tercile_lengths,
)
from sparsity_forcing.inputs import InputError
from sparsity_forcing.models.prompts import encode_prompts
from sparsity_forcing.params import DigitsParams, ProfileParams, parse_params
from sparsity_forcing.stages import profile
from sparsity_forcing.tracking import TrackingError

BUDGETS = [0.3, 0.6, 1.0]
PARAMS = {
    "model": {"name": "org/none", "device": "cpu"},
    "sparsity": {"p": 0.6, "protect_text": False},
    "evaluate": {"budgets": [0.6]},
    "profile": {
        "budgets": BUDGETS,
        "grids": [4, 6, 8],
        "rows": 6,
        "batch_size": 4,
        "max_new_tokens": 2,
        "scoring_rows": ["text", "all"],
    },
}


@pytest.fixture(scope="module")
def done(tiny, rows, migrated_store, tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("profile")
    shutil.copytree(tiny.directory, root / "models/base")
    write_rows(rows, root / "data/prepared/validation.parquet")
    shutil.copy(migrated_store, root / "mlflow.db")
    return root, profile.run(parse_params(PARAMS), root)


def test_the_tables_have_a_row_per_question_and_setting(done):
    root, metrics = done
    tables = {name: pd.read_csv(root / f"plots/profile/{name}.csv") for name in profile.SUMMARIZED_BY}
    questions, budgets, layers = 6, 3, 2
    assert {name: len(table) for name, table in tables.items()} == {
        "by_budget": questions * budgets,
        "by_layer": questions * budgets * layers,
        "by_length": questions * budgets * 3,
        "by_scoring_rows": questions * budgets * 2,
    }
    assert set(tables["by_budget"]["length"]) == {"6x6"}  # the middle one
    assert list(tables["by_length"]["length"].unique()) == ["4x4", "6x6", "8x8"]
    assert json.loads((root / "metrics/profile.json").read_text()) == json.loads(json.dumps(metrics))


def test_the_numbers_are_those_of_direct_measurement(done, tiny):
    root, metrics = done
    params = parse_params(PARAMS)
    asked = digits_lengths(params.data.digits, [6], rows=6, seed=params.seed).groups["6x6"]
    inputs = encode_prompts(tiny.processor, [row.question for row in asked], [row.images for row in asked])
    table = pd.read_csv(root / "plots/profile/by_scoring_rows.csv")
    for scoring_rows in ("text", "all"):
        for p in BUDGETS:
            with sparse_attention(tiny.model, p=p, settings=params.sparsity, scoring_rows=scoring_rows) as stats:
                tiny.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            mine = table[(table["scoring_rows"] == scoring_rows) & (table["p"] == p)].set_index("id")
            expected = stats.visual_token_ratio.tolist()
            assert mine.loc[[row.id for row in asked], "visual_token_ratio"].tolist() == pytest.approx(
                expected, abs=1e-5
            )
            if scoring_rows == "text":
                by_layer = [row for row in metrics["by_layer"] if row["p"] == p]
                assert [row["layer"] for row in by_layer] == [0, 1]
                found = torch.tensor([row["visual_token_ratio"] for row in by_layer])
                assert torch.allclose(found, stats.layer_visual_ratio.mean(1), atol=1e-5)


def test_summaries_are_means_over_questions_with_intervals(done):
    root, metrics = done
    table = pd.read_csv(root / "plots/profile/by_length.csv")
    for point in metrics["by_length"]:
        mine = table[(table["length"] == point["length"]) & (table["p"] == point["p"])]
        assert point["n"] == len(mine) == 6
        assert point["accuracy"] == pytest.approx(mine["score"].mean())
        assert (point["accuracy_low"], point["accuracy_high"]) == wilson_interval(point["accuracy"], 6)
        assert point["token_ratio"] == pytest.approx(mine["token_ratio"].mean(), abs=1e-5)
    ratios = {(point["length"], point["p"]): point["token_ratio"] for point in metrics["by_length"]}
    for length in ("4x4", "6x6", "8x8"):
        assert ratios[length, 0.3] < ratios[length, 0.6] < ratios[length, 1.0] == 1.0


def test_digits_lengths_are_new_canvases_of_validation_scans():
    lengths = digits_lengths(DigitsParams(), [12, 6, 8], rows=6, seed=0)
    assert list(lengths.groups) == ["6x6", "8x8", "12x12"]
    assert lengths.middle == "8x8"
    part = SPLITS["validation"]
    for group in lengths.groups.values():
        assert {row.task for row in group} == {"read", "count", "sum"}
        assert all(part.start <= scan < part.stop for row in group for scan in row.meta["scans"])
    assert lengths == digits_lengths(DigitsParams(), [6, 8, 12], rows=6, seed=0)


def test_terciles_of_the_users_rows_are_ordered_by_prompt_length(tiny, rows):
    texts = ["?", "red?", "which digit is red?", "which digit is red or blue?" * 2]
    asked = [replace(row, question=texts[place % 4]) for place, row in enumerate(rows)]
    lengths = tercile_lengths(asked, tiny.processor, rows=3, seed=0)
    assert [len(group) for group in lengths.groups.values()] == [3, 3, 3]

    def tokens(row) -> int:
        return encode_prompts(tiny.processor, [row.question], [row.images])["input_ids"].shape[1]

    short, medium, long = ([tokens(row) for row in group] for group in lengths.groups.values())
    assert max(short) <= min(medium)
    assert max(medium) <= min(long)
    assert max(short) < min(long)
    with pytest.raises(ProfileError, match=r"at least 3 validation rows, got 2; .*data\.user\.validation_share"):
        tercile_lengths(asked[:2], tiny.processor, rows=3, seed=0)


def test_the_deployed_scoring_rows_are_measured_once():
    lengths = digits_lengths(DigitsParams(), [6, 8], rows=2, seed=0)
    points = settings_to_profile(lengths, ProfileParams(budgets=(0.5, 1.0)), deployed="text")
    assert len(points) == len(set(points)) == 2 * 2 + 2 * 2
    assert Setting("8x8", "probe", 0.5) in points
    assert Setting("6x6", "probe", 0.5) not in points


def test_missing_inputs_are_named(tmp_path):
    with pytest.raises(InputError, match=r"validation\.parquet \(made by stage prepare\)"):
        profile.run(parse_params(PARAMS), tmp_path)


def test_a_store_that_cannot_be_used_costs_no_profile(done, tmp_path, monkeypatch):
    for folder in ("models", "data"):
        (tmp_path / folder).symlink_to(done[0] / folder)
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    monkeypatch.setattr(profile, "profile_model", lambda *_, **__: pytest.fail("profiled all the same"))
    with pytest.raises(TrackingError, match="is damaged"):
        profile.run(parse_params(PARAMS), tmp_path)


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_the_same(done, tiny, rows, migrated_store, tmp_path):
    shutil.copytree(tiny.directory, tmp_path / "models/base")
    write_rows(rows, tmp_path / "data/prepared/validation.parquet")
    shutil.copy(migrated_store, tmp_path / "mlflow.db")
    kill_stage("profile", tmp_path, PARAMS, lambda log: "profile " in log)
    assert not (tmp_path / "plots").exists()
    assert not (tmp_path / "metrics").exists()

    assert profile.run(parse_params(PARAMS), tmp_path) == done[1]
    tables = [f"plots/profile/{name}.csv" for name in profile.SUMMARIZED_BY]
    assert all((tmp_path / table).read_bytes() == (done[0] / table).read_bytes() for table in tables)
