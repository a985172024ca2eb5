"""Running a stage through DVC: what happened, what failed and how, and how it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows.pipeline import main
from flows.workspace import StageError, WorkspaceError, check_workspace, is_up_to_date, reproduce
from sparsity_forcing.params import ParamsError


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_a_stage_runs_once_and_its_lines_are_heard(toy_workspace):
    root = toy_workspace("echo working; echo result > out")
    check_workspace(root)
    lines: list[str] = []
    assert not is_up_to_date(root)
    assert reproduce("prepare", root, lines.append) == "ran"
    assert "working" in lines
    assert is_up_to_date(root)
    assert reproduce("prepare", root, lines.append) == "up to date"
    (root / "out").unlink()
    assert reproduce("prepare", root, lines.append) == "restored from cache"
    assert (root / "out").read_text() == "result\n"


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_failed_stage_gives_its_own_exit_code(toy_workspace, code):
    root = toy_workspace(f"echo the reason; exit {code}")
    check_workspace(root)
    lines: list[str] = []
    with pytest.raises(StageError, match="stage prepare failed") as caught:
        reproduce("prepare", root, lines.append)
    assert caught.value.exit_code == code
    assert "the reason" in lines


def test_a_second_run_in_the_same_workspace_is_told_apart_from_a_failure(toy_workspace):
    root = toy_workspace("touch started; sleep 60; echo x > out")
    check_workspace(root)
    first = subprocess.Popen([sys.executable, "-m", "dvc", "repro"], cwd=root, start_new_session=True)
    try:
        wait_for(root / "started")
        with pytest.raises(WorkspaceError, match="another DVC run works in this workspace"):
            reproduce("prepare", root)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    (root / "command.sh").write_text("echo x > out")
    assert reproduce("prepare", root) == "ran"  # a lock left by a killed run is no obstacle


def test_stopping_the_flow_stops_the_stage_and_lets_it_save(toy_workspace):
    """SIGTERM to the process that runs the flow reaches the stage below DVC, which saves before it goes."""
    root = toy_workspace("trap 'echo saved > checkpoint; exit 143' TERM; touch started; while :; do sleep 0.1; done")
    check_workspace(root)
    code = (
        "import signal, sys; from pathlib import Path; from flows.workspace import reproduce\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "reproduce('prepare', Path('.'))"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    wait_for(root / "started")
    family = psutil.Process(flow.pid).children(recursive=True)  # DVC and the stage
    assert len(family) >= 2
    flow.terminate()
    assert flow.wait(30) == 143
    assert (root / "checkpoint").read_text() == "saved\n"
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_parameters_are_checked_before_anything_runs(toy_workspace):
    root = toy_workspace("touch out")
    values = yaml.safe_load((root / "params.yaml").read_text())
    (root / "params.yaml").write_text(yaml.safe_dump(values | {"sparsity": {"p": 3}}))
    with pytest.raises(ParamsError, match=r"sparsity\.p.*less than or equal to 1.*3"):
        check_workspace(root)


def test_a_key_that_dvc_needs_written_out_is_named_before_dvc_removes_outputs(toy_workspace):
    root = toy_workspace("touch out")
    values = yaml.safe_load((root / "params.yaml").read_text())
    del values["seed"]
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ParamsError, match="lacks seed"):
        check_workspace(root)


def test_files_that_dvc_does_not_see_are_told_when_nothing_else_would_say_it(toy_workspace, capsys, monkeypatch):
    """Nothing is out of date, as far as DVC knows."""
    root = toy_workspace("touch out")
    values = yaml.safe_load((root / "params.yaml").read_text())
    data = {"source": "chat_jsonl", "user": {"path": "/tmp/rows.jsonl"}}
    (root / "params.yaml").write_text(yaml.safe_dump(values | {"data": data, "model": {"name": "org/model"}}))
    check_workspace(root)
    reproduce("prepare", root)
    monkeypatch.chdir(root)
    main([])
    said = capsys.readouterr().out
    assert "data.user.path '/tmp/rows.jsonl' is outside user_data/" in said
    assert "Everything is up to date: nothing was run." in said


def test_a_model_that_was_put_among_the_outputs_is_refused_and_still_there(smoke_workspace):
    """Also by `dvc repro` itself, which removes the outputs of a stage before it starts it."""
    model = smoke_workspace / "models/base/model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_text("weights that exist nowhere else")
    path = smoke_workspace / "params.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": {"name": "models/base"}}))
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "base"], cwd=smoke_workspace, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "is inside models/" in done.stderr
    assert model.read_text() == "weights that exist nowhere else"


def test_a_damaged_lock_file_is_named(toy_workspace):
    root = toy_workspace("echo x > out")
    check_workspace(root)
    (root / "dvc.lock").write_text("<<<<<<< HEAD\n: [")
    with pytest.raises(WorkspaceError, match=r"dvc\.lock"):
        reproduce("prepare", root)


def test_a_folder_without_git_works_and_one_that_becomes_a_repository_too(toy_workspace):
    root = toy_workspace("echo x > out")
    check_workspace(root)
    assert reproduce("prepare", root) == "ran"
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    check_workspace(root)
    assert reproduce("prepare", root) == "up to date"
    assert "no_scm" not in (root / ".dvc" / "config.local").read_text()
