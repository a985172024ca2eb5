"""`make ui`: a server on loopback that opens on the right experiment, or a clear word why not."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]


def ui(workspace: Path, port: int, **environment: str) -> subprocess.Popen:
    shutil.copy(ROOT / "presets" / "smoke.yaml", workspace / "params.yaml")
    return subprocess.Popen(
        [sys.executable, "-m", "flows.ui", "--port", str(port)],
        cwd=workspace,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_in_use_is_named_with_the_way_out(tmp_path, listener):
    process = ui(tmp_path, listener)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"port {listener} is in use; choose another: make ui PORT={listener + 1}" in errors


def test_a_server_that_is_away_is_named(tmp_path):
    process = ui(tmp_path, 5000, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the MLflow server http://127.0.0.1:9 does not answer" in errors


@pytest.mark.slow
def test_the_address_it_prints_is_served_and_is_that_of_the_experiment(workspace, listener):
    port = listener + 1 if listener < 65535 else listener - 1
    process = ui(workspace, port)
    try:
        address = process.stdout.readline().split()[-1]
        experiment = address.rpartition("/")[2]
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id={experiment}"
        found = wait_for_json(url, seconds=120)["experiment"]
        assert found["name"] == "sparsity-forcing-smoke"
        assert found["artifact_location"].startswith(workspace.as_uri())
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)


def wait_for_json(url: str, seconds: float) -> dict:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return httpx.get(url, timeout=10).raise_for_status().json()
        except httpx.TransportError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.5)
