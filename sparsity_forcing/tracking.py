"""The one place that knows MLflow: runs, metrics, tables, datasets, the model registry, the link to a comparison.

Runs are flat (the charts page hides nested ones). Every run carries its stage, the git commit and the md5s of what the
stage read, so that a number in the UI can be traced to the code and data that made it, and which execution of the stage
it belongs to, so that the rows of one evaluation can be told from those of another. The store is ``mlflow.db`` in the
workspace, or the server that ``MLFLOW_TRACKING_URI`` names.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from sparsity_forcing.lineage import file_digest, git_state, input_md5s
from sparsity_forcing.params import TrackingParams

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

DEFAULT_UI = "http://127.0.0.1:5000"
EXECUTION, HOST, PID, WORKSPACE = "execution", "host", "pid", "workspace"  # tags: which execution of a stage, and where


class TrackingError(RuntimeError):
    """MLflow's store cannot be used; the message names it and the way out."""


class CopiedStoreError(TrackingError, ValueError):
    """The store is that of another workspace: what is logged would be written there."""


class Run:
    """One MLflow run that is under way."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self.run_id = client, run_id

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers under names such as ``eval/accuracy``; ``step`` makes them points of a curve."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self.run_id, metrics=[Metric(name, float(value), now, step or 0) for name, value in values.items()]
        )

    def training_step(self, metrics: Mapping[str, float]) -> None:
        """Logs what the trainer reports of a step, each number as a point of the curve ``train/NAME``."""
        names = {f"train/{name.replace('/', '_')}": value for name, value in metrics.items() if name != "step"}
        self.metrics(names, step=int(metrics["step"]))

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Logs a file or a directory with all that is in it, below ``folder`` of the run's artifacts."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder or None)

    def table(self, rows: pd.DataFrame, name: str) -> None:
        """Logs a table that the UI can show; ``name`` ends in .json or .parquet."""
        self._client.log_table(self.run_id, rows, name)

    def dataset(self, path: str | Path, name: str, split: str) -> None:
        """Logs a parquet file as an input of the run. Its digest is the file's md5, the one DVC knows it by."""
        import mlflow.data
        from mlflow.entities import DatasetInput, InputTag

        path = Path(path)
        with warnings.catch_warnings():  # MLflow registers its source for local files twice and warns of the choice
            warnings.simplefilter("ignore", UserWarning)
            dataset = mlflow.data.from_pandas(
                _flat_columns(path), source=path.resolve().as_uri(), name=name, digest=file_digest(path, "md5")
            )
        given = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", split)])
        self._client.log_inputs(self.run_id, datasets=[given])


class Tracker:
    """The store of one workspace, for one execution of a stage. Creates the experiment on first use."""

    def __init__(self, params: TrackingParams, root: Path) -> None:
        from mlflow import MlflowClient

        self.params, self.root = params, Path(root).resolve()
        self.uri = tracking_uri(self.root)
        self._execution = uuid.uuid4().hex
        self._tags: dict[str, dict[str, str]] = {}  # by stage: its inputs may be large, and are digested once
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it announces every migration
        with _store_errors(self.uri):
            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            self.experiment_id = self._experiment()

    @contextmanager
    def run(
        self,
        stage: str,
        name: str,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, object] | None = None,
    ) -> Iterator[Run]:
        """A run that ends as FINISHED, as FAILED after an exception, as KILLED when the process is asked to stop.

        What a process that was killed outright left running in this workspace ends as KILLED here.

        ``params`` are the few values that vary between runs, ``tags`` the constants.
        """
        from mlflow.entities import Param

        with _store_errors(self.uri):
            self._end_orphans(stage)
            created = self._client.create_run(
                self.experiment_id, run_name=name, tags=self._lineage_tags(stage) | _strings(tags)
            )
            run_id = created.info.run_id
            self._client.log_batch(run_id, params=[Param(key, value) for key, value in _strings(params).items()])
        status = "FAILED"
        try:
            with _store_errors(self.uri):
                yield Run(self._client, run_id)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            with _store_errors(self.uri):
                self._client.set_terminated(run_id, status)

    def latest_runs(self, stage: str) -> list[str]:
        """Ids of the finished runs of the newest execution of ``stage``, in the order they were started."""
        finished = f"tags.stage = '{stage}' and attributes.status = 'FINISHED'"
        with _store_errors(self.uri):
            newest = next(self._search(finished, page=1), None)
            if newest is None:
                return []
            execution = newest.data.tags.get(EXECUTION)
            runs = self._search(f"{finished} and tags.{EXECUTION} = '{execution}'") if execution else [newest]
            return [run.info.run_id for run in runs][::-1]

    def compare_url(self, run_ids: Sequence[str], ui: str | None = None) -> str:
        """Opens the comparison (parallel coordinates, scatter) of these runs in the MLflow UI at ``ui``, by default the
        server that holds them, or where `make ui` serves them.
        """
        chosen = (quote(json.dumps(list(ids))) for ids in (run_ids, [self.experiment_id]))
        return "{}/#/compare-runs?runs={}&experiments={}".format(ui or ui_of(self.uri), *chosen)

    def experiment_url(self, ui: str | None = None) -> str:
        """Opens the experiment of this workspace in the MLflow UI; ``ui`` as in `compare_url`."""
        return f"{ui or ui_of(self.uri)}/#/experiments/{self.experiment_id}"

    def register_policy(self, directory: str | Path, run_id: str, metrics: Mapping[str, float]) -> str:
        """Registers a `save_pretrained` directory as the next version of the model and moves the alias to it.

        `models:/NAME@ALIAS` then downloads the directory, which plain transformers loads. Returns the version.
        """
        from mlflow.entities import LoggedModelStatus

        name = self.params.registered_model
        with _store_errors(self.uri):
            model = self._client.create_logged_model(
                self.experiment_id, name=name, source_run_id=run_id, model_type="transformers"
            )
            self._client.log_model_artifacts(model.model_id, str(directory))
            self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self._ensure_registered_model(name)
            version = self._client.create_model_version(
                name,
                source=model.artifact_location,
                run_id=run_id,
                model_id=model.model_id,
                tags=self._lineage_tags("train") | _strings(metrics),
            ).version
            self._client.set_registered_model_alias(name, self.params.alias, version)
        return str(version)

    def _search(self, filter_string: str, page: int = 1000) -> Iterator[StoredRun]:
        """Runs of the experiment, the newest first, however many there are."""
        token = None
        while True:
            found = self._client.search_runs(
                [self.experiment_id], filter_string, max_results=page, order_by=["start_time DESC"], page_token=token
            )
            yield from found
            token = found.token
            if not token:
                return

    def _end_orphans(self, stage: str) -> None:
        """Ends the runs of ``stage`` in this workspace whose process is gone without having said so."""
        for run in self._search(f"tags.stage = '{stage}' and attributes.status = 'RUNNING'"):
            tags = run.data.tags
            here = tags.get(HOST) == socket.gethostname() and tags.get(WORKSPACE) == str(self.root)
            if here and not _is_alive(int(tags[PID])):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.params.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            embedded = self.uri.startswith("sqlite:///")
            try:
                return self._client.create_experiment(name, (self.root / "mlruns").as_uri() if embedded else None)
            except MlflowException as error:  # another stage was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise error from None
        files, here = found.artifact_location, f"{self.root.as_uri()}/"
        if self.uri == _own_store(self.root) and files.startswith("file:") and not files.startswith(here):
            raise CopiedStoreError(
                f"the experiment {name!r} in {self.root / 'mlflow.db'} keeps its files in {files}: this workspace is a "
                "copy of that one, or was moved from there. Move it back, set another tracking.experiment, or remove "
                "mlflow.db and mlruns/ here, which forgets the runs in this copy"
            )
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"the MLflow experiment {name!r} is deleted; restore it with "
                f"`mlflow experiments restore --experiment-id {found.experiment_id}` or set another tracking.experiment"
            )
        return found.experiment_id

    def _ensure_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _lineage_tags(self, stage: str) -> dict[str, str]:
        if stage not in self._tags:
            git = git_state(self.root)
            code = {"stage": stage, "git.commit": git.commit, "git.dirty": str(git.dirty).lower()}
            where = {HOST: socket.gethostname(), PID: str(os.getpid()), WORKSPACE: str(self.root)}
            data = {f"dvc.{path}.md5": md5 for path, md5 in input_md5s(self.root, stage).items()}
            self._tags[stage] = code | where | {EXECUTION: self._execution} | data
        return self._tags[stage]


def tracking_uri(root: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or the SQLite file of the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _own_store(root)


def _own_store(root: Path) -> str:
    return f"sqlite:///{Path(root).resolve() / 'mlflow.db'}"


def ui_of(uri: str) -> str:
    """Where the runs of the store ``uri`` are looked at: a server shows its own. A password in ``uri`` is left out."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return DEFAULT_UI
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    """Says what to do when the store is busy, broken or away; every other error passes."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except (MlflowException, DatabaseError) as error:
        reason = str(error)
        if "database is locked" in reason:
            raise TrackingError(
                f"MLflow's database {uri} is locked by another process; wait for it or stop it (another run or "
                "`make ui` in the same workspace), then start again. A shared store needs a server: MLFLOW_TRACKING_URI"
            ) from error
        if "file is not a database" in reason or "disk image is malformed" in reason:
            raise TrackingError(
                f"MLflow's database {uri} is damaged; move the file away and start again: a new one is created"
            ) from error
        if "database or disk is full" in reason or "disk I/O error" in reason:
            raise TrackingError(
                f"MLflow's database {uri} cannot be written ({reason.splitlines()[0]}); is the disk full?"
            ) from error
        if "Max retries exceeded" in reason or "Connection refused" in reason:
            raise TrackingError(
                f"the MLflow server {uri} does not answer; start it, or unset MLFLOW_TRACKING_URI to use the "
                "SQLite file of the workspace"
            ) from error
        raise


def _strings(values: Mapping[str, object] | None) -> dict[str, str]:
    return {key: str(value) for key, value in (values or {}).items()}


def _flat_columns(path: Path) -> pd.DataFrame:
    """The columns that MLflow can describe: all but lists and image bytes."""
    import pyarrow.parquet as pq
    import pyarrow.types as types

    schema = pq.read_schema(path)
    flat = [field.name for field in schema if not types.is_nested(field.type) and not types.is_binary(field.type)]
    return pq.read_table(path, columns=flat).to_pandas()
