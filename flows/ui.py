"""`make ui`: the MLflow UI on loopback, with the address that opens on this workspace's experiment."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsity_forcing.params import ParamsError, load_params
from sparsity_forcing.tracking import Tracker, TrackingError

HOST = "127.0.0.1"


def main(port: Annotated[int, typer.Option(min=1, max=65535)] = 5000) -> None:
    """Serves the runs of the workspace in the current folder until it is interrupted."""
    root = Path(".")
    if "MLFLOW_TRACKING_URI" not in os.environ and not is_free(port):
        sys.exit(f"port {port} is in use; choose another: make ui PORT={port + 1}")
    try:
        tracker = Tracker(load_params(root / "params.yaml").tracking, root)
    except (ParamsError, TrackingError) as error:
        sys.exit(str(error))
    if "MLFLOW_TRACKING_URI" in os.environ:
        print(f"MLflow runs at MLFLOW_TRACKING_URI: {tracker.experiment_url()}")
        return
    print(f"MLflow UI: {tracker.experiment_url(f'http://{HOST}:{port}')}", flush=True)
    artifacts = (tracker.root / "mlruns").as_uri()
    server = ["-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    os.execv(
        sys.executable,
        [sys.executable, *server, "--backend-store-uri", tracker.uri, "--default-artifact-root", artifacts],
    )


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    typer.run(main)
