"""The flows under Prefect's own harness: real server, real runs, in scratch workspaces."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest
from prefect.artifacts import Artifact
from prefect.exceptions import ParameterTypeError
from prefect.testing.utilities import prefect_test_harness

from flows.pipeline import pipeline
from flows.prepare_data import prepare_data
from flows.stage import run_stage
from flows.workspace import StageError
from sparsity_forcing.params import ParamsError


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


def test_the_pipeline_runs_a_stage_and_a_second_run_finds_nothing_to_do(smoke_workspace):
    with contextlib.chdir(smoke_workspace):
        assert pipeline(stages=["prepare"]) == {"prepare": "ran"}
        assert (smoke_workspace / "data" / "prepared" / "test.parquet").exists()
        assert pipeline(stages=["prepare"]) == {"prepare": "up to date"}
        assert prepare_data() == "up to date"
    progress = Artifact.get(key="stages")
    assert (progress.type, progress.data, progress.description) == ("progress", 100.0, "prepare: up to date")


def test_a_stage_is_tried_again_when_the_failure_may_pass(toy_workspace, monkeypatch):
    monkeypatch.setattr(run_stage, "retry_delay_seconds", [0, 0])
    root = toy_workspace("echo x >> tries; test $(wc -l < tries) -ge 3 && echo done > out")
    assert prepare_data(root) == "ran"
    assert (root / "tries").read_text().count("x") == 3


def test_a_stage_is_not_tried_again_when_its_input_is_wrong(toy_workspace):
    root = toy_workspace("echo x >> tries; exit 2")
    with pytest.raises(StageError, match="exit code 2"):
        prepare_data(root)
    assert (root / "tries").read_text().count("x") == 1


def test_wrong_parameters_end_the_flow_before_any_stage(toy_workspace):
    root = toy_workspace("echo x >> tries; echo done > out")
    (root / "params.yaml").write_text("seed: -1\n")
    with pytest.raises(ParamsError, match="seed"):
        pipeline(stages=["prepare"], root=root)
    assert not (root / "tries").exists()


def test_an_unknown_stage_is_refused_by_the_flow_itself(toy_workspace):
    with pytest.raises(ParameterTypeError, match=r"stages\.0.*'prepare', 'base'"):
        pipeline(stages=["prepair"], root=toy_workspace("true"))


def test_what_a_stage_prints_is_in_the_log_of_the_run(toy_workspace, caplog):
    root = toy_workspace("echo half way; echo done > out")
    with caplog.at_level(logging.INFO, logger="prefect.task_runs"):
        prepare_data(root)
    assert "half way" in caplog.text
