"""prefect.yaml on a real local server: both deployments are deployed and fired once."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

pytestmark = pytest.mark.slow


@pytest.fixture
def deployed_workspace(smoke_workspace) -> Path:
    """The workspace with the real prefect.yaml, save that its deployments run one stage instead of six."""
    path = smoke_workspace / "prefect.yaml"
    config = yaml.safe_load(path.read_text())
    for deployment in config["deployments"]:
        deployment["parameters"]["stages"] = ["prepare"]
    path.write_text(yaml.safe_dump(config))
    return smoke_workspace


@pytest.fixture
def api(deployed_workspace, prefect_environment) -> Iterator[httpx.Client]:
    """A server on a free loopback port, the deployments on it, and a worker."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = prefect_environment | {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_LOGGING_LEVEL": "WARNING",
    }

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(prefect(*arguments), cwd=deployed_workspace, env=environment, stdout=log, stderr=log)

    def run(*arguments: str) -> None:
        done = subprocess.run(
            prefect(*arguments), cwd=deployed_workspace, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    log_path = deployed_workspace.parent / "prefect.log"
    with log_path.open("w") as log, contextlib.ExitStack() as stack:
        stack.callback(stop, start("server", "start", "--host", "127.0.0.1", "--port", str(port)))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}/api/", timeout=30))
        client.run = run
        wait_until(lambda: is_healthy(client), 180, log_path)
        run("work-pool", "create", "local", "--type", "process")
        run("work-pool", "set-concurrency-limit", "local", "1")
        run("--no-prompt", "deploy", "--all")
        stack.callback(stop, start("worker", "start", "--pool", "local", "--name", "test"))
        yield client


def prefect(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_healthy(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("health").status_code == 200
    return False


def wait_until(condition: Callable[[], bool], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


def runs(client: httpx.Client, deployment_id: str) -> list[str]:
    """States of the deployment's runs that were fired, so without those the cron schedule has planned."""
    body = {"flow_runs": {"deployment_id": {"any_": [deployment_id]}}}
    found = client.post("flow_runs/filter", json=body).raise_for_status().json()
    return [run["state_type"] for run in found if not run["auto_scheduled"]]


def test_both_deployments_run_when_they_are_fired(api, deployed_workspace):
    deployments = {item["name"]: item for item in api.post("deployments/filter", json={}).raise_for_status().json()}
    assert set(deployments) == {"nightly", "new-dataset"}
    (schedule,) = deployments["nightly"]["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("0 2 * * *", True)
    log = deployed_workspace.parent / "prefect.log"

    api.run("deployment", "run", "sparsity-forcing/nightly")
    wait_until(lambda: runs(api, deployments["nightly"]["id"]) == ["COMPLETED"], 120, log)
    assert (deployed_workspace / "metrics" / "prepare.json").exists()
    assert runs(api, deployments["new-dataset"]["id"]) == []

    api.run("event", "emit", "sparsity-forcing.dataset.created", "--resource-id", "sparsity-forcing.dataset")
    wait_until(lambda: runs(api, deployments["new-dataset"]["id"]) == ["COMPLETED"], 120, log)
