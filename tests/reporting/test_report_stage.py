"""The stage in a workspace with real models, a real MLflow store and nothing made up but the metrics before it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from killed import kill_stage
from mlflow import MlflowClient

from sparsity_forcing.data.schema import read_rows, write_rows
from sparsity_forcing.evaluation.samples import write_samples
from sparsity_forcing.evaluation.table import TableError, benchmark_table
from sparsity_forcing.lineage import dvc_md5
from sparsity_forcing.params import parse_params
from sparsity_forcing.reporting.content import BASE_ARM, DENSE_ARM, POLICY_ARM
from sparsity_forcing.stages import report
from sparsity_forcing.stages.report import run
from sparsity_forcing.tracking import Tracker, tracking_uri

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ready(report_root, migrated_store):
    shutil.copy(migrated_store, report_root / "mlflow.db")
    return report_root


def test_stage_measures_writes_and_logs(report_params, ready, capsys):
    tracker = Tracker(report_params.tracking, ready)
    with tracker.run(stage="evaluate", name="policy top-p p=0.975") as evaluation:
        pass
    metrics = run(report_params, ready)
    assert json.loads((ready / "metrics/report.json").read_text()) == metrics
    assert set(metrics["efficiency"]) == {"visual_tokens_16", "visual_tokens_100"}
    longest = metrics["efficiency"]["visual_tokens_100"]
    assert (longest["batch"], longest["new_tokens"], longest["repetitions"]) == (2, 3, 2)
    assert set(longest["arms"]) == {DENSE_ARM, BASE_ARM, POLICY_ARM}
    assert metrics["decode"]["visual_tokens"] == 16  # the made-up evaluation has 36 at most
    arms = longest["arms"]
    assert arms[POLICY_ARM]["cache_bytes"] < arms[DENSE_ARM]["cache_bytes"]
    assert metrics["headline"]["accuracy_difference"] == pytest.approx(-0.1)
    assert metrics["not_measured"] == {}

    page = (ready / "reports/index.html").read_text()
    assert evaluation.run_id in page
    assert "compare-runs" in page
    assert page.count('class="example"') == 2
    assert "not_measured" not in page

    client = MlflowClient(tracking_uri=tracking_uri(ready))
    logged = client.get_run(tracker.latest_runs("report")[-1])
    assert logged.data.metrics["bench/cache_ratio"] == pytest.approx(metrics["cache_bytes"]["ratio"])
    assert logged.data.metrics["bench/decode_speedup"] == pytest.approx(1 / metrics["decode"]["ratio"])
    short = metrics["efficiency"]["visual_tokens_16"]["arms"][POLICY_ARM]
    assert logged.data.metrics["bench/visual_tokens_16/cache_ratio"] == pytest.approx(short["cache_ratio"])
    artifacts = {item.path for item in client.list_artifacts(logged.info.run_id, "report")}
    assert {"report/index.html", "report/index.md", "report/figures"} <= artifacts
    assert str(ready / "reports" / "index.html") in capsys.readouterr().out.replace("\n", "")


def test_without_models_the_report_says_so(report_params, ready):
    (ready / "models").unlink()
    metrics = run(report_params, ready)
    assert "models/policy is not there" in metrics["not_measured"]["efficiency"]
    assert "decode" not in metrics
    assert "not measured.</strong> models/base is not there" in (ready / "reports/index.html").read_text()


def test_text_only_rows_have_no_visual_ratio_and_do_not_break_the_report(report_params, ready):
    rows = [replace(row, images=[], meta={}) for row in read_rows(ready / "data/prepared/test.parquet")]
    write_rows(rows, ready / "data/prepared/test.parquet")
    samples = pd.read_parquet(ready / "evaluation/samples.parquet")
    text_only = samples.assign(visual_tokens=0, visual_token_ratio=None, layer_visual_ratio=None)
    write_samples(text_only.to_dict("records"), ready / "evaluation/samples.parquet")
    table = benchmark_table(text_only).model_dump(mode="json")
    (ready / "metrics/evaluate.json").write_text(json.dumps(table))
    source = {"source": "chat_jsonl", "user": {"path": "user_data/rows.jsonl"}}
    changed = {"data": source, "model": {"name": "org/model"}}
    params = parse_params(report_params.model_dump(mode="json") | changed)

    metrics = run(params, ready)
    assert json.loads((ready / "metrics/report.json").read_text()) == metrics
    arms = metrics["efficiency"]["visual_tokens_0"]["arms"]
    assert {name: arm["visual_token_ratio"] for name, arm in arms.items()} == dict.fromkeys(arms)
    assert "| **policy, sparse** | **not measured** |" in (ready / "reports/index.md").read_text()


def test_the_report_and_its_metrics_are_written_together_or_not_at_all(report_params, ready, monkeypatch):
    old = {ready / "reports/index.html": "the report before", ready / "metrics/report.json": "the metrics before"}
    for path, text in old.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(report, "report_metrics", lambda *_: {"decode": float("nan")})
    with pytest.raises(ValueError, match=r"report\.json cannot be written as JSON"):
        run(report_params, ready)
    assert {path: path.read_text() for path in old} == old
    assert [path.name for path in (ready / "reports").iterdir()] == ["index.html"]


def test_the_report_names_what_it_read_and_not_the_report_before(report_params, ready):
    shutil.copy(ROOT / "dvc.yaml", ready)
    (ready / "reports").mkdir()
    (ready / "reports/index.html").write_text("the report before")
    run(report_params, ready)
    page = (ready / "reports/index.md").read_text()
    lineage = page[page.index("## Lineage") :]
    assert f"| evaluation/samples.parquet | {dvc_md5(ready / 'evaluation/samples.parquet')} |" in lineage
    assert f"| models/policy | {dvc_md5(ready / 'models/policy')} |" in lineage
    assert "| reports" not in lineage
    assert "metrics/report.json" not in lineage


def test_without_an_evaluation_nothing_is_written(report_params, ready):
    (ready / "metrics/evaluate.json").unlink()
    with pytest.raises(TableError, match=r"metrics/evaluate\.json does not exist: run the evaluate stage first"):
        run(report_params, ready)
    assert not (ready / "reports").exists()
    assert not (ready / "metrics/report.json").exists()


def test_a_failure_leaves_the_old_report(report_params, ready, monkeypatch):
    (ready / "reports").mkdir()
    (ready / "reports/index.html").write_text("the report before")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsity_forcing.reporting.build.render_html", full)
    with pytest.raises(OSError, match="No space left"):
        run(report_params, ready)
    assert [path.name for path in (ready / "reports").iterdir()] == ["index.html"]
    assert (ready / "reports/index.html").read_text() == "the report before"


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_the_old_report_and_ends_the_same(report_params, ready):
    (ready / "reports").mkdir()
    (ready / "reports/index.html").write_text("the report before")
    values = report_params.model_dump(mode="json")
    kill_stage("report", ready, values, lambda _: any(ready.glob(".reports.new.tmp/*")))
    assert (ready / "reports/index.html").read_text() == "the report before"
    assert not (ready / "metrics/report.json").exists()

    metrics = run(report_params, ready)
    assert json.loads((ready / "metrics/report.json").read_text()) == metrics
    assert "sparsity" in (ready / "reports/index.html").read_text().lower()
    assert not list(ready.glob(".*.tmp"))
