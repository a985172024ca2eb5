"""What a flow run shows in Prefect's UI: progress, the benchmark table, the report's summary, links."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from sparsity_forcing.params import Params
from sparsity_forcing.tracking import Tracker


@dataclass(frozen=True)
class Links:
    """Where a person looks after a run. ``compare``: the evaluated rows side by side in the MLflow UI."""

    report: Path
    compare: str


def find_links(params: Params, root: Path) -> Links:
    tracker = Tracker(params.tracking, root)
    return Links(
        report=(root / "reports" / "index.html").resolve(),
        compare=tracker.compare_url(tracker.latest_runs("evaluate")),
    )


class ProgressArtifact:
    """A bar over the stages of one flow run."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._id: UUID = create_progress_artifact(0.0, key="stages", description="stages done")

    def advance(self, stage: str, outcome: str) -> None:
        self.done += 1
        update_progress_artifact(self._id, 100.0 * self.done / self.total, description=f"{stage}: {outcome}")


def publish_benchmark(root: Path) -> None:
    """The rows of metrics/evaluate.json as a table artifact."""
    rows = json.loads((root / "metrics" / "evaluate.json").read_text(encoding="utf-8"))["rows"]
    create_table_artifact(rows, key="benchmark", description="Accuracy and token ratio, in 0-1, by method and budget")


def publish_report(params: Params, root: Path) -> None:
    """The first section of the report as a markdown artifact, and links to the page and the comparison."""
    create_markdown_artifact(summary((root / "reports" / "index.md").read_text(encoding="utf-8")), key="report-summary")
    links = find_links(params, root)
    create_link_artifact(links.report.as_uri(), link_text="the report", key="report")
    create_link_artifact(links.compare, link_text="compare the evaluated rows in MLflow", key="mlflow-compare")


def summary(report: str) -> str:
    """What stands above the second heading of the second level, without pictures (their paths end here)."""
    sections = report.split("\n## ")
    lines = "\n## ".join(sections[:2]).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("![")).strip() + "\n"
