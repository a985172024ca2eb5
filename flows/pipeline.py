"""The main job: every stage in order, from raw rows to the report. `make pipeline` runs this.

Prefect decides when, where and how often to try; DVC, below it, decides what is up to date. So a second run does
nothing, and a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from flows.artifacts import ProgressArtifact, find_links
from flows.base_model import base
from flows.efficiency_report import report
from flows.evaluate import evaluate
from flows.prepare_data import prepare
from flows.profile_sparsity import profile
from flows.train_grpo import train
from flows.workspace import Outcome, StageError, WorkspaceError, check_workspace, is_up_to_date
from sparsity_forcing.lineage import LineageError
from sparsity_forcing.params import Params, ParamsError
from sparsity_forcing.places import require_places
from sparsity_forcing.stages import STAGES
from sparsity_forcing.tracking import TrackingError

Stage = Literal["prepare", "base", "profile", "train", "evaluate", "report"]
RUN = {"prepare": prepare, "base": base, "profile": profile, "train": train, "evaluate": evaluate, "report": report}
EXPLAINED = (ParamsError, StageError, WorkspaceError, TrackingError, LineageError)  # no traceback needed


@flow(name="sparsity-forcing")
def pipeline(
    stages: Annotated[list[Stage], Field(min_length=1)] = list(STAGES),  # noqa: B006 - Prefect shows it in its form
    root: Path = Path("."),
) -> dict[str, Outcome]:
    """Brings the chosen stages up to date, in the pipeline's order. Returns what happened to each."""
    logger = get_run_logger()
    check_workspace(root)
    if is_up_to_date(root):
        logger.info("everything is up to date: nothing to run")
        return {stage: "up to date" for stage in STAGES if stage in stages}
    chosen = [stage for stage in STAGES if stage in stages]
    progress, outcomes = ProgressArtifact(len(chosen)), {}
    for stage in chosen:
        outcomes[stage] = RUN[stage](root)
        progress.advance(stage, outcomes[stage])
    return outcomes


def main(
    stages: Annotated[list[str] | None, typer.Argument(help=f"Some of: {' '.join(STAGES)}. Default: all.")] = None,
) -> None:
    """Runs the pipeline in the current folder and prints where its results are."""
    root = Path(".")
    chosen = stages or list(STAGES)
    if unknown := sorted(set(chosen) - set(STAGES)):
        raise typer.BadParameter(f"unknown stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    # Prefect passes SIGTERM on to the handler that was there before its own. Leaving through sys.exit, not through the
    # default, lets its temporary server be stopped.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        params = check_workspace(root)
        for told in require_places(params, root):
            print(told)
        if is_up_to_date(root):
            print("Everything is up to date: nothing was run.")
        else:
            pipeline(stages=chosen, root=root)
        print_results(params, root)
    except EXPLAINED as error:
        print(f"\n{error}", file=sys.stderr)
        raise typer.Exit(1) from None


def print_results(params: Params, root: Path) -> None:
    links = find_links(params, root)
    if not links.report.exists():
        return  # only some stages were asked for
    print(f"\nReport:   {links.report}")
    print(f"Compare:  {links.compare}")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        print("          (start the MLflow UI with `make ui`)")


if __name__ == "__main__":
    typer.run(main)
