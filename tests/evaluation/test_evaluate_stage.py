"""The evaluate stage in a workspace of its own: base and policy, worker processes, MLflow, a kill in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from imported_code import ROOT, imported_modules, module_file

from sparsity_forcing.data.schema import Row, write_rows
from sparsity_forcing.evaluation.runner import CODE, device_at, shares
from sparsity_forcing.evaluation.samples import read_samples
from sparsity_forcing.evaluation.table import load_table
from sparsity_forcing.evaluation.workers import WorkerError
from sparsity_forcing.inputs import InputError
from sparsity_forcing.params import Params, parse_params
from sparsity_forcing.stages import evaluate
from sparsity_forcing.tracking import TrackingError

PARAMS = {
    "model": {"name": "org/none", "device": "cpu"},
    "sparsity": {"p": 0.6, "protect_text": False},
    "evaluate": {"budgets": [0.3, 0.6], "batch_size": 5, "max_new_tokens": 6},
}
ROWS = [("Full", 1.0), ("top-p", 0.3), ("top-p", 0.6)]
OUTPUTS = ("evaluation/samples.parquet", "metrics/evaluate.json")


@pytest.fixture(scope="module")
def params() -> Params:
    return parse_params(PARAMS)


@pytest.fixture(scope="module")
def fill(tiny, rows, migrated_store):
    """Makes a directory a workspace: 12 questions, the tiny model as base, one with other weights as policy."""
    from sparsity_forcing.models.tiny import build_model
    from sparsity_forcing.params import ScratchModel

    def fill(root: Path, rows: list[Row] = rows) -> Path:
        write_rows(rows, root / evaluate.TEST)
        shutil.copytree(tiny.directory, root / "models/base")
        policy = build_model(ScratchModel(layers=2), tiny.processor.tokenizer, seed=1)
        policy.save_pretrained(root / "models/policy")
        tiny.processor.save_pretrained(root / "models/policy")
        shutil.copy(migrated_store, root / "mlflow.db")
        (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))
        return root

    return fill


@pytest.fixture(scope="module")
def done(fill, params, tmp_path_factory) -> Path:
    """A workspace in which the stage has run, straight through."""
    root = fill(tmp_path_factory.mktemp("straight"))
    evaluate.run(params, root)
    return root


@pytest.mark.slow
def test_the_table_holds_every_row_and_is_what_the_samples_say(done):
    table = load_table(done / "metrics/evaluate.json")
    samples = read_samples(done / "evaluation/samples.parquet")
    assert len(samples) == 2 * 3 * 12
    averages = [(row.checkpoint, row.method, row.p) for row in table.averages()]
    assert averages == [(checkpoint, *row) for checkpoint in ("base", "policy") for row in ROWS]
    for row in table.averages():
        mine = samples[(samples["checkpoint"] == row.checkpoint) & (samples["p"] == row.p)]
        assert (row.n, row.accuracy) == (12, mine["score"].mean())
        assert row.visual_token_ratio == pytest.approx(mine["visual_token_ratio"].mean())
    assert table.find("Full", "base", 1.0).accuracy == 0.5  # by construction of the fixture
    assert table.find("Full", "policy", 1.0).accuracy < 0.5  # other weights, other answers
    assert table.find("top-p", "base", 0.3).token_ratio < table.find("top-p", "base", 0.6).token_ratio < 1
    assert {row.benchmark for row in table.rows} == {"read_6x6", "read_8x8", "sum_6x6", "sum_8x8", "average"}


@pytest.mark.slow
def test_one_flat_mlflow_run_per_row(done, params):
    from mlflow import MlflowClient

    from sparsity_forcing.tracking import Tracker

    client = MlflowClient(tracking_uri=f"sqlite:///{done / 'mlflow.db'}")
    runs = [client.get_run(run_id) for run_id in Tracker(params.tracking, done).latest_runs("evaluate")]
    table = load_table(done / "metrics/evaluate.json")
    assert len(runs) == 6
    for run in runs:
        assert "mlflow.parentRunId" not in run.data.tags
        given = run.data.params
        row = table.find(given["method"], given["checkpoint"], float(given["sparse.p"]))
        assert run.data.metrics["eval/accuracy"] == pytest.approx(row.accuracy)
        assert run.data.metrics["eval/token_ratio"] == pytest.approx(row.token_ratio)
        assert run.data.metrics["eval/visual_token_ratio"] == pytest.approx(row.visual_token_ratio)
        read = table.find(row.method, row.checkpoint, row.p, "read_8x8")
        assert run.data.metrics["eval/read_8x8"] == pytest.approx(read.accuracy)
        assert [dataset.dataset.name for dataset in run.inputs.dataset_inputs] == ["test"]


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_ends_the_same(done, fill, params, tmp_path, capsys):
    root = fill(tmp_path)
    finished = root / evaluate.CACHE / "rows"  # a row that is being written has a name with a dot in front
    command = [sys.executable, "-m", "sparsity_forcing", "evaluate", "--root", str(root)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or any(finished.glob("[!.]*.parquet")))
            assert process.poll() is None, "ended before a row was done"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert not any((root / output).exists() for output in OUTPUTS)
    kept = len(list(finished.glob("[!.]*.parquet")))
    assert 1 <= kept < 6

    more = params.evaluate.model_copy(update={"workers": 4})  # two a checkpoint, where it is not done
    evaluate.run(params.model_copy(update={"evaluate": more}), root)
    assert capsys.readouterr().out.count("kept from the run before") == kept
    for output in OUTPUTS:
        assert (root / output).read_bytes() == (done / output).read_bytes(), output
    assert not (root / evaluate.CACHE).exists()


@pytest.mark.parametrize(
    "workers, expected",
    [
        (1, ["abcde", "fg"]),
        (2, ["abcde", "fg"]),
        (3, ["ace", "bd", "fg"]),
        (4, ["ad", "be", "c", "fg"]),
        (5, ["ad", "be", "c", "f", "g"]),
        (9, ["a", "b", "c", "d", "e", "f", "g"]),
    ],
)
def test_the_rows_of_a_checkpoint_are_dealt_out_to_the_workers(workers, expected):
    assert shares(["abcde", "fg"], workers) == expected
    assert shares([], workers) == []


@pytest.mark.parametrize(
    "device, count, expected",
    [("auto", 0, "auto"), ("cpu", 3, "cpu"), ("cuda", 1, "cuda"), ("auto", 3, "cuda:1"), ("cuda:0", 3, "cuda:0")],
)
def test_processes_take_turns_on_the_gpus(monkeypatch, device, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert device_at(4, device) == expected


@pytest.mark.slow
def test_a_broken_image_fails_with_its_error_and_writes_nothing(fill, params, rows, tmp_path):
    broken = [replace(rows[0], images=[rows[0].images[0][:40]]), *rows[1:]]
    root = fill(tmp_path, broken)
    one_at_a_time = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"workers": 1})})
    with pytest.raises(WorkerError, match=r"(?s)evaluation-0 failed:.*(UnidentifiedImageError|OSError)"):
        evaluate.run(one_at_a_time, root)
    assert not any((root / output).exists() for output in OUTPUTS)


def test_missing_inputs_are_named_with_the_stage_that_makes_them(params, tmp_path, rows):
    write_rows(rows, tmp_path / evaluate.TEST)
    with pytest.raises(InputError, match=r"models/base \(made by stage base\), models/policy \(made by stage train\)"):
        evaluate.run(params, tmp_path)


def test_the_fingerprint_depends_on_everything_that_matters(fill, params, tmp_path):
    from sparsity_forcing.evaluation.runner import Job, fingerprint
    from sparsity_forcing.methods import TopP

    root = fill(tmp_path)
    benchmark = evaluate.write_benchmark(params, root)
    job = Job("base", root / "models/base", TopP(0.6, params.sparsity))
    same = fingerprint(Job("base", root / "models/base", TopP(0.6, params.sparsity)), benchmark)
    assert same == fingerprint(job, benchmark)
    text_protected = params.sparsity.model_copy(update={"protect_text": True})
    other_score = parse_params(PARAMS | {"train": {"reward": {"correct": "anls"}}})
    others = [
        fingerprint(Job("policy", job.directory, job.method), benchmark),
        fingerprint(Job("base", root / "models/policy", job.method), benchmark),
        fingerprint(Job("base", job.directory, TopP(0.5, params.sparsity)), benchmark),
        fingerprint(Job("base", job.directory, TopP(0.6, text_protected)), benchmark),
        fingerprint(job, replace(benchmark, batch_size=6)),
        fingerprint(job, evaluate.write_benchmark(other_score, root)),
    ]
    config = json.loads((root / "models/base/config.json").read_text())
    (root / "models/base/config.json").write_text(json.dumps(config | {"note": 1}))
    others.append(fingerprint(job, benchmark))
    assert len({same, *others}) == 1 + len(others)


def test_the_fingerprint_depends_on_the_users_score_function_and_what_lies_beside_it(
    fill, params, tmp_path, monkeypatch
):
    root = fill(tmp_path)
    (root / "user_scores").mkdir()
    (root / "user_scores/exact.py").write_text(
        "from user_scores.helper import same\ndef score(said, answer): return float(same(said, answer))\n"
    )
    (root / "user_scores/helper.py").write_text("def same(said, answer): return said == answer\n")
    monkeypatch.syspath_prepend(str(root))
    mine = parse_params(PARAMS | {"train": {"reward": {"correct": "user_scores.exact:score"}}})

    def digest() -> str:
        return evaluate.write_benchmark(mine, root).digest

    before = digest()
    assert before == digest() != evaluate.write_benchmark(params, root).digest
    (root / "user_scores/helper.py").write_text("def same(said, answer): return said.strip() == answer\n")
    assert digest() != before


def test_the_code_in_the_fingerprint_is_all_that_decides_an_answer():
    """Every module that the workers run, but those that only carry the result."""
    around = {"files", "lineage", "torchvision_ops", "inputs"}
    for start in ("evaluation.lmms_model", "evaluation.runner", "evaluation.task_functions"):
        for module in imported_modules(start) - around:
            path = module_file(module).relative_to(ROOT / "sparsity_forcing")
            named = [Path(name) for name in CODE if not Path(name).is_absolute()]
            assert any(path == name or name in path.parents for name in named), f"{module} is not in CODE"


def test_a_store_that_cannot_be_used_costs_no_evaluation(fill, params, tmp_path, monkeypatch):
    root = fill(tmp_path)
    (root / "mlflow.db").write_text("not a database " * 100)
    monkeypatch.setattr(evaluate, "evaluate_rows", lambda *_: pytest.fail("evaluated all the same"))
    with pytest.raises(TrackingError, match="is damaged"):
        evaluate.run(params, root)


def wait_until(condition, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
