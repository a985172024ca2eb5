"""The stage as the pipeline runs it."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
from killed import kill_stage

from sparsity_forcing.data.prepare import DataError
from sparsity_forcing.data.schema import SPLITS, read_rows
from sparsity_forcing.params import parse_params
from sparsity_forcing.stages import prepare

MODEL = {"curriculum": [{"steps": 1}]}


def digits():
    sizes = {"grids": [4, 5], "train_rows": 12, "validation_rows": 6, "test_rows": 6}
    return parse_params({"data": {"digits": sizes}, "model": MODEL})


def chats(workspace, lines, **data):
    (workspace / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    user = {"path": "rows.jsonl", "validation_share": 0.3, "test_share": 0.3}
    return parse_params({"data": {"source": "chat_jsonl", "user": user, **data}, "model": {"name": "org/model"}})


def outputs(workspace):
    paths = [workspace / "metrics/prepare.json", workspace / "data/quarantine.parquet"]
    return {path.name: path.read_bytes() for path in [*paths, *sorted((workspace / "data/prepared").iterdir())]}


def test_the_default_source_twice_gives_the_same_bytes(workspace):
    metrics = prepare.run(digits(), workspace)
    first = outputs(workspace)
    assert json.loads(first["prepare.json"]) == metrics
    assert {split: metrics["rows"][split]["total"] for split in SPLITS} == {"train": 12, "validation": 6, "test": 6}
    assert metrics["rows"]["train"]["tasks"]["sum_5x5"] == 2
    assert prepare.run(digits(), workspace) == metrics
    assert outputs(workspace) == first
    assert sorted(path.name for path in (workspace / "data").iterdir()) == ["prepared", "quarantine.parquet"]


def test_the_run_is_in_mlflow_with_its_datasets(workspace):
    from mlflow import MlflowClient

    params = digits()
    prepare.run(params, workspace)
    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(params.tracking.experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["prepare/train_rows"] == 12
    assert {found.dataset.name for found in run.inputs.dataset_inputs} == {f"digits-{split}" for split in SPLITS}


def test_the_users_rows_are_split_and_the_bad_ones_kept_apart(workspace):
    lines = [json.dumps({"prompt": f"what is {i}?", "completion": str(i), "id": i}) for i in range(40)]
    metrics = prepare.run(chats(workspace, [*lines, "{broken"]), workspace)
    assert metrics["quarantined"]["reasons"] == {"malformed_json": 1}
    rows = [row for split in SPLITS for row in read_rows(workspace / f"data/prepared/{split}.parquet")]
    assert {row.id for row in rows} == {str(i) for i in range(40)}
    (rejected,) = pq.read_table(workspace / "data/quarantine.parquet").to_pylist()
    assert (rejected["line"], rejected["raw"]) == (41, "{broken")
    assert rejected["file"].endswith("rows.jsonl")


def test_too_much_quarantine_fails_but_is_written(workspace):
    prepare.run(digits(), workspace)
    before = outputs(workspace)
    lines = [json.dumps({"prompt": "q", "completion": str(i)}) for i in range(24)] + ["{", "{"]
    with pytest.raises(DataError, match=r"2 of 26 rows .* malformed_json 2\. data/quarantine\.parquet"):
        prepare.run(chats(workspace, lines), workspace)
    after = outputs(workspace)
    assert len(pq.read_table(workspace / "data/quarantine.parquet")) == 2
    assert {name: content for name, content in after.items() if name != "quarantine.parquet"} == {
        name: content for name, content in before.items() if name != "quarantine.parquet"
    }
    metrics = prepare.run(chats(workspace, lines, max_quarantine_fraction=0.2), workspace)
    assert metrics["rows_in"] == 26


def test_the_success_line_says_why_rows_are_in_quarantine(workspace, capsys):
    lines = [json.dumps({"prompt": f"what is {i}?", "completion": str(i), "id": i}) for i in range(40)]
    prepare.run(chats(workspace, lines), workspace)
    assert capsys.readouterr().out.endswith("0 of 40 rows in quarantine\n")
    prepare.run(chats(workspace, [*lines, "{broken", lines[0]]), workspace)
    assert "(malformed_json 1, duplicate_id 1): data/quarantine.parquet names file" in capsys.readouterr().out


def test_two_validation_rows_are_too_few(workspace):
    splits = ["train"] * 4 + ["validation"] * 2 + ["test"]
    lines = [json.dumps({"prompt": "q?", "completion": "a", "id": i, "split": split}) for i, split in enumerate(splits)]
    with pytest.raises(DataError, match=r"validation has 2 row\(s\), at least 3 are needed; add rows"):
        prepare.run(chats(workspace, lines), workspace)
    assert not (workspace / "data/prepared").exists()


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_the_same(workspace, migrated_store, tmp_path_factory):
    values = {"data": {"digits": {"grids": [12], "train_rows": 1200}}, "model": MODEL}
    kill_stage("prepare", workspace, values, lambda _: any((workspace / "data").glob(".prepared.new.tmp/*")))
    assert not (workspace / "data/prepared").exists()
    assert not (workspace / "metrics").exists()
    prepare.run(parse_params(values), workspace)

    straight = tmp_path_factory.mktemp("straight")
    shutil.copy(migrated_store, straight / "mlflow.db")
    prepare.run(parse_params(values), straight)
    assert outputs(workspace) == outputs(straight)
    assert sorted(path.name for path in (workspace / "data").iterdir()) == ["prepared", "quarantine.parquet"]
