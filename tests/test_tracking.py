"""MLflow through the tracker, on a real SQLite store."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import mlflow
import pandas as pd
import pytest
from full_disk import files_at_most
from mlflow import MlflowClient
from sqlalchemy import Engine, event

from sparsity_forcing.lineage import dvc_md5
from sparsity_forcing.params import TrackingParams
from sparsity_forcing.tracking import Run, Tracker, TrackingError, ui_of

PARAMS = TrackingParams()


@pytest.fixture
def tracker(workspace) -> Tracker:
    (workspace / "dvc.yaml").write_text(
        "stages:\n"
        "  train: {outs: [models/policy]}\n"
        "  evaluate: {deps: [models/policy, sparsity_forcing/evaluation]}\n"
        "  report: {outs: [reports]}\n"
    )
    for folder in ("models/policy", "reports"):
        (workspace / folder).mkdir(parents=True)
        (workspace / folder / "file").write_text(folder)
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
    expected = {"stage": "evaluate", "preset": "smoke", "git.commit": "none"}
    expected["dvc.models/policy.md5"] = dvc_md5(tracker.root / "models/policy")
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


def evaluate(tracker: Tracker, *names: str) -> list[str]:
    """One execution of the stage, with a run of each name; their ids."""
    ids = []
    for name in names:
        with Tracker(PARAMS, tracker.root).run(stage="train", name="train"):
            pass
        with tracker.run(stage="evaluate", name=name) as run:
            ids.append(run.run_id)
    return ids


def test_the_latest_runs_are_those_of_the_newest_execution(tracker, monkeypatch):
    assert tracker.latest_runs("evaluate") == []
    evaluate(tracker, "base dense", "policy p=0.94", "policy p=0.975")
    newest = Tracker(PARAMS, tracker.root)
    ids = evaluate(newest, "base dense", "policy p=0.975")  # without p=0.94
    with pytest.raises(ValueError, match="boom"), newest.run(stage="evaluate", name="failed"):
        raise ValueError("boom")
    assert tracker.latest_runs("evaluate") == ids

    search = MlflowClient.search_runs  # a store with more runs than a page holds
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **k: search(*a, **k | {"max_results": 1}))
    assert tracker.latest_runs("evaluate") == ids


@pytest.mark.parametrize(
    "uri, ui",
    [
        ("sqlite:////workspace/mlflow.db", "http://127.0.0.1:5000"),
        ("http://mlflow.example:5001", "http://mlflow.example:5001"),
        ("https://name:password@mlflow.example/base/", "https://mlflow.example/base"),
    ],
)
def test_links_lead_to_the_server_that_holds_the_runs(tracker, monkeypatch, uri, ui):
    assert ui_of(uri) == ui
    monkeypatch.setattr(tracker, "uri", uri)
    assert tracker.compare_url(["a"]).startswith(f"{ui}/#/compare-runs?")
    assert tracker.experiment_url() == f"{ui}/#/experiments/{tracker.experiment_id}"
    assert tracker.experiment_url("http://127.0.0.1:7").startswith("http://127.0.0.1:7/#")


def test_the_link_that_compares_runs_holds_their_ids(tracker):
    latest = evaluate(tracker, "base dense", "policy top-p")
    fragment = urlsplit(tracker.compare_url(latest)).fragment
    query = parse_qs(urlsplit(fragment).query)
    assert fragment.startswith("/compare-runs?")
    assert json.loads(unquote(query["runs"][0])) == latest
    assert json.loads(unquote(query["experiments"][0])) == [tracker.experiment_id]


def test_what_a_killed_process_left_running_ends_as_killed(tracker, client, migrated_store):
    """Killed outright, a process says nothing; the next run of the same stage in the same workspace says it for it."""

    def leave_running(stage: str, root: Path) -> str:
        (root / "mlflow.db").exists() or shutil.copy(migrated_store, root / "mlflow.db")
        code = (
            "import os, sys; from pathlib import Path; from sparsity_forcing.params import TrackingParams\n"
            "from sparsity_forcing.tracking import Tracker\n"
            f"with Tracker(TrackingParams(), Path({str(root)!r})).run(stage={stage!r}, name='x') as run:\n"
            "    print(run.run_id, flush=True); os.kill(os.getpid(), 9)"
        )
        environment = os.environ | {"MLFLOW_TRACKING_URI": tracker.uri}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        ).stdout.strip()

    (tracker.root / "other").mkdir()
    mine, other_stage = leave_running("train", tracker.root), leave_running("base", tracker.root)
    other_workspace = leave_running("train", tracker.root / "other")
    with (
        tracker.run(stage="train", name="train") as alive,
        Tracker(PARAMS, tracker.root).run(stage="train", name="two"),
    ):
        status = {name: client.get_run(name).info.status for name in (mine, other_stage, other_workspace, alive.run_id)}
    assert status == {mine: "KILLED", other_stage: "RUNNING", other_workspace: "RUNNING", alive.run_id: "RUNNING"}


def test_a_copied_workspace_does_not_write_into_the_one_it_was_copied_from(tracker, tmp_path_factory):
    evaluate(tracker, "base dense")
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(tracker.root / "mlflow.db", copy)
    with pytest.raises(TrackingError, match=r"is a copy of that one, or was moved .* remove mlflow\.db"):
        Tracker(PARAMS, copy).experiment_url()
    other = Tracker(PARAMS.model_copy(update={"experiment": "another"}), copy)
    with other.run(stage="train", name="train") as run:
        run.artifact(tracker.root / "dvc.yaml")
    assert list((copy / "mlruns").iterdir())


def log_much(run: Run) -> None:
    for step in range(400):
        run.metrics({"train/reward": 0.5}, step=step)


def test_a_full_disk_under_the_store_is_named(tracker):
    size = (tracker.root / "mlflow.db").stat().st_size
    with (
        pytest.raises(TrackingError, match=r"mlflow\.db cannot be written .*is the disk full"),
        files_at_most(size),
        tracker.run(stage="train", name="train") as run,
    ):
        log_much(run)


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
