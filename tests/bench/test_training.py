"""The trainer beside TRL's: both train for real, and what is not whole gives no figure."""

from __future__ import annotations

import json
from functools import partial

import pytest
from typer.testing import CliRunner

from sparsity_forcing.bench import __main__ as command
from sparsity_forcing.bench import training
from sparsity_forcing.bench.compare import BenchError


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in {"GRID": 4, "PROMPTS": 2, "NEW_TOKENS": 4, "STEPS": 2}.items():
        monkeypatch.setattr(training, name, value)


def test_both_engines_train(tmp_path):
    trainings = (training.train_ours, training.train_trl, partial(training.train_trl, together=8))
    for place, train in enumerate(trainings):
        found = json.loads(json.dumps(train(tmp_path / str(place))))
        assert len(found["seconds"]) == 2
        assert min(found["seconds"]) > 0
        assert 1 <= found["mean_length"] <= 4
        assert found["peak"] >= found["start"] > 1e8
    assert (found["settings"]["per_device_train_batch_size"], found["settings"]["steps_per_generation"]) == (8, 2)


def test_a_step_without_a_gradient_gives_no_figure():
    with pytest.raises(BenchError, match="not 2 whole steps"):
        training._require_whole([0.1, 0.0], [16, 16])
    with pytest.raises(BenchError, match="not 2 whole steps"):
        training._require_whole([0.1, float("nan")], [16, 16])
    with pytest.raises(BenchError, match="not 2 whole steps"):
        training._require_whole([0.1, 0.1], [16, 15])


def test_an_engine_that_fails_is_named(monkeypatch):
    monkeypatch.setattr(training.sys, "executable", "false")
    with pytest.raises(BenchError, match="trl did not train"):
        training._in_a_process("trl")


def test_the_command_writes_what_it_says(tmp_path, monkeypatch):
    run = {"seconds": [1.0, 2.0, 1.5, 1.5], "mean_length": 4.0, "start": 1, "peak": 100, "setting": {}, "settings": {}}
    slow, lean = run | {"seconds": [6.0], "peak": 400}, run | {"seconds": [7.0], "peak": 200}
    runs = {"ours": run, "trl": slow, "trl_parts": lean}
    monkeypatch.setattr(training, "_in_a_process", runs.get)
    done = CliRunner().invoke(command.app, ["trl", "--output", str(tmp_path / "bench.json"), "--rounds", "1"])
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["completions_per_second_ratio"], found["peak_memory_ratio"]) == (4.0, 0.5)
    assert found["group_of_8_over_one"] > 0
    assert json.loads((tmp_path / "bench.json").read_text())["summary"].keys() == found.keys()
