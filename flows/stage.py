"""One stage as a Prefect task: run through DVC, tried again after a failure that may pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.tasks import Task, exponential_backoff

from flows.workspace import WRONG_INPUT, Outcome, StageError, reproduce


def _may_pass(task: Task[..., Any], run: TaskRun, state: State) -> bool:
    try:
        state.result()
    except StageError as failure:
        return failure.exit_code != WRONG_INPUT
    except BaseException:
        return False
    return False


@task(
    task_run_name="{stage}",
    cache_policy=NO_CACHE,  # DVC decides what is up to date, by content
    retries=2,
    retry_delay_seconds=exponential_backoff(backoff_factor=5),
    retry_condition_fn=_may_pass,
)
def run_stage(stage: str, root: Path) -> Outcome:
    """Brings the outputs of ``stage`` up to date. A retry goes on from what the stage saved."""
    logger = get_run_logger()
    outcome = reproduce(stage, root, log=logger.info)
    logger.info("%s: %s", stage, outcome)
    return outcome
