"""MLflow through the tracker, on a real SQLite store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from sqlalchemy import Engine, event

from sparsity_forcing.params import TrackingParams
from sparsity_forcing.tracking import Tracker, TrackingError

PARAMS = TrackingParams()


@pytest.fixture
def tracker(workspace) -> Tracker:
    (workspace / "dvc.yaml").write_text(
        "stages:\n  evaluate:\n    deps: [models/policy, sparsity_forcing/evaluation]\n"
    )
    (workspace / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n"
        "  train: {cmd: x, outs: [{path: models/policy, hash: md5, md5: aaa.dir}]}\n"
        "  report: {cmd: x, outs: [{path: reports, hash: md5, md5: bbb.dir}]}\n"
    )
    return Tracker(PARAMS, workspace)


@pytest.fixture
def client(tracker) -> Iterator[MlflowClient]:
    """Reads what the tracker wrote the way a user does: through MLflow's own client and its global setting."""
    mlflow.set_tracking_uri(tracker.uri)
    yield MlflowClient()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def impatient_sqlite() -> Iterator[None]:
    """MLflow waits 20 s for a locked SQLite file; a test need not."""

    def shorten(connection, cursor, statement, parameters, context, executemany):
        return statement.replace("busy_timeout = 20000", "busy_timeout = 100"), parameters

    event.listen(Engine, "before_cursor_execute", shorten, retval=True)
    yield
    event.remove(Engine, "before_cursor_execute", shorten)


def test_a_run_holds_what_was_given_and_where_it_comes_from(tracker, client):
    params, tags = {"method": "top-p", "sparse.p": 0.975}, {"preset": "smoke"}
    with tracker.run(stage="evaluate", name="policy top-p", params=params, tags=tags) as run:
        run.metrics({"eval/accuracy": 0.9, "eval/token_ratio": 0.4})
        for step in (1, 2):
            run.metrics({"train/reward": step / 2}, step=step)
        run.table(pd.DataFrame({"question": ["which digit?"], "tau": [0.25]}), "samples.json")
        run.artifact(tracker.root / "dvc.yaml", folder="code")

    stored = client.get_run(run.run_id)
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "policy top-p")
    assert stored.data.params == {"method": "top-p", "sparse.p": "0.975"}
    assert stored.data.metrics == {"eval/accuracy": 0.9, "eval/token_ratio": 0.4, "train/reward": 1.0}
    curve = client.get_metric_history(run.run_id, "train/reward")
    assert [(point.step, point.value) for point in curve] == [(1, 0.5), (2, 1.0)]
    expected = {"stage": "evaluate", "preset": "smoke", "git.commit": "none", "dvc.models/policy.md5": "aaa.dir"}
    assert {key: stored.data.tags.get(key) for key in expected} == expected
    assert "dvc.reports.md5" not in stored.data.tags  # not an input of this stage
    assert client.load_table(tracker.experiment_id, "samples.json", [run.run_id])["tau"].tolist() == [0.25]
    assert [file.path for file in client.list_artifacts(run.run_id, "code")] == ["code/dvc.yaml"]
    assert (tracker.root / "mlruns").is_dir()


def test_dataset_digest_is_the_md5_of_the_file(tracker, client):
    import hashlib

    path = tracker.root / "test.parquet"
    pd.DataFrame({"id": ["a", "b"], "images": [[b"png"], [b"png"]]}).to_parquet(path)
    with tracker.run(stage="prepare", name="prepare") as run:
        run.dataset(path, name="digits", split="test")
    (given,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("digits", hashlib.md5(path.read_bytes()).hexdigest())
    assert [tag.value for tag in given.tags] == ["test"]
    assert json.loads(given.dataset.profile)["num_rows"] == 2


@pytest.mark.parametrize(
    "error, status", [(ValueError("boom"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(143), "KILLED")]
)
def test_a_run_that_ends_early_says_so(tracker, client, error, status):
    with pytest.raises(type(error)), tracker.run(stage="train", name="train") as run:
        raise error
    assert client.get_run(run.run_id).info.status == status


def test_latest_runs_and_the_link_that_compares_them(tracker):
    ids = {}
    for name in ("base dense", "policy top-p", "base dense"):  # the last one replaces the first
        with tracker.run(stage="evaluate", name=name) as run:
            ids[name] = run.run_id
    with tracker.run(stage="train", name="train"):
        pass
    latest = tracker.latest_runs("evaluate")
    assert sorted(latest) == sorted(ids.values())

    fragment = urlsplit(tracker.compare_url(latest)).fragment
    query = parse_qs(urlsplit(fragment).query)
    assert fragment.startswith("/compare-runs?")
    assert json.loads(unquote(query["runs"][0])) == latest
    assert json.loads(unquote(query["experiments"][0])) == [tracker.experiment_id]


def test_registered_policy_is_loadable_through_its_alias(tracker, client):
    from sparsity_forcing.data.digits import corpus
    from sparsity_forcing.models.tiny import build_model, build_processor
    from sparsity_forcing.params import ScratchModel

    processor = build_processor(corpus())
    directory = tracker.root / "models" / "policy"
    for seed in (0, 1):
        build_model(ScratchModel(layers=2), processor.tokenizer, seed).save_pretrained(directory)
        with tracker.run(stage="train", name="train") as run:
            version = tracker.register_policy(directory, run.run_id, {"eval/accuracy": 0.9})
    assert version == "2"

    found = client.get_model_version_by_alias(PARAMS.registered_model, PARAMS.alias)
    assert (str(found.version), found.run_id) == ("2", run.run_id)
    assert {found.tags["eval/accuracy"], found.tags["stage"]} == {"0.9", "train"}
    address = f"models:/{PARAMS.registered_model}@{PARAMS.alias}"
    downloaded = mlflow.artifacts.download_artifacts(
        address, dst_path=str(tracker.root / "download"), tracking_uri=tracker.uri
    )
    from transformers import AutoModelForImageTextToText

    loaded = AutoModelForImageTextToText.from_pretrained(downloaded)
    expected = AutoModelForImageTextToText.from_pretrained(directory)
    assert all((a == b).all() for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_a_locked_database_is_named_with_the_way_out(tracker, impatient_sqlite):
    other = sqlite3.connect(tracker.root / "mlflow.db")
    other.execute("BEGIN EXCLUSIVE")
    with (
        pytest.raises(TrackingError, match=r"mlflow\.db.* is locked by another process"),
        tracker.run(stage="train", name="train"),
    ):
        pytest.fail("a run began in a locked store")
    other.close()


def test_a_damaged_database_is_named_with_the_way_out(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    with pytest.raises(TrackingError, match=r"mlflow\.db is damaged; move the file away"):
        Tracker(PARAMS, tmp_path)


def test_a_server_that_is_away_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9 does not answer"):
        Tracker(PARAMS, tmp_path)


def test_a_deleted_experiment_is_an_error_not_a_lost_run(tracker, client):
    client.delete_experiment(tracker.experiment_id)
    with pytest.raises(TrackingError, match="is deleted; restore it"):
        Tracker(PARAMS, tracker.root)
