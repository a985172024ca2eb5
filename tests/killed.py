"""Kills a stage in the middle of its work, as a power cut would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml


def kill_stage(stage: str, root: Path, params: dict, under_way: Callable[[str], bool], seconds: float = 300.0) -> None:
    """Runs ``python -m sparsity_forcing STAGE`` and sends SIGKILL once ``under_way(its output so far)`` holds.

    Fails if the stage ends before that.
    """
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    log = root / "stage.log"
    command = [sys.executable, "-m", "sparsity_forcing", stage, "--root", str(root)]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, start_new_session=True, stdout=errors, stderr=errors) as process,
    ):
        try:
            deadline = time.monotonic() + seconds
            while not under_way(log.read_text()):
                assert process.poll() is None, f"{stage} ended before it could be killed: {log.read_text()}"
                assert time.monotonic() < deadline, "waited too long"
                time.sleep(0.005)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
