"""Stopping a run of the main job from outside: the stage saves, nothing is left running."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest


@pytest.mark.slow
def test_sigterm_lets_the_stage_save_and_leaves_no_process_behind(toy_workspace, prefect_environment):
    root = toy_workspace(
        "trap 'sleep 1; echo saved > checkpoint; exit 143' TERM; touch started; while :; do sleep 0.1; done"
    )
    with (root / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "flows.pipeline", "prepare"],
            cwd=root,
            env=prefect_environment,
            stdout=log,
            stderr=log,
        )
        deadline = time.monotonic() + 240
        while not (root / "started").exists():
            assert run.poll() is None, (root / "log").read_text()
            assert time.monotonic() < deadline, (root / "log").read_text()
            time.sleep(0.1)
        family = psutil.Process(run.pid).children(recursive=True)  # DVC, the stage, Prefect's temporary server
        assert len(family) >= 3
        run.terminate()
        assert run.wait(90) == 143
    assert (root / "checkpoint").read_text() == "saved\n"
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
