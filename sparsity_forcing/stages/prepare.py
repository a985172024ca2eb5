"""Stage `prepare`: the source's rows in one schema, split, checked, the bad ones in quarantine."""

from __future__ import annotations

from pathlib import Path

from sparsity_forcing.data.checks import Limits
from sparsity_forcing.data.prepare import MIN_OWN_VALIDATION_ROWS, open_source, prepare_rows, require_usable
from sparsity_forcing.data.schema import SPLITS
from sparsity_forcing.files import replace_directory, write_json_atomic
from sparsity_forcing.params import Params
from sparsity_forcing.tracking import Tracker

PREPARED, QUARANTINE = Path("data/prepared"), Path("data/quarantine.parquet")


def run(params: Params, root: Path) -> dict:
    """Writes data/prepared/, data/quarantine.parquet and metrics/prepare.json; returns the metrics.

    Raises:
        DataError: too many rows are in quarantine (its file is written all the same), or a split has too few.
        SchemaError, FileNotFoundError: the user's file as a whole cannot be read.
    """
    data = params.data
    limits = Limits(data.max_question_characters, data.user.tasks if data.source != "digits" else data.digits.tasks)
    tracker = Tracker(params.tracking, root)
    with tracker.run(stage="prepare", name=f"prepare {data.source}", params={"data.source": data.source}) as run:
        with replace_directory(root / PREPARED) as directory:
            candidates = open_source(data, params.seed, root)
            summary = prepare_rows(candidates, limits, directory, root / QUARANTINE)
            metrics = summary.metrics()
            least = MIN_OWN_VALIDATION_ROWS if data.source != "digits" else 1
            require_usable(summary, data.max_quarantine_fraction, QUARANTINE, least)
        write_json_atomic(root / "metrics/prepare.json", metrics)
        run.metrics({f"prepare/{split}_rows": metrics["rows"][split]["total"] for split in SPLITS})
        run.metrics({"prepare/quarantined": metrics["quarantined"]["total"]})
        for split in SPLITS:
            run.dataset(root / PREPARED / f"{split}.parquet", name=f"{data.source}-{split}", split=split)
        run.artifact(root / QUARANTINE)
    print(_closing_line(metrics, summary.why))
    return metrics


def _closing_line(metrics: dict, why: str) -> str:
    rows = ", ".join(f"{split} {metrics['rows'][split]['total']:,}" for split in SPLITS)
    line = f"prepare: {rows}; {metrics['quarantined']['total']:,} of {metrics['rows_in']:,} rows in quarantine"
    return f"{line} ({why}): {QUARANTINE} names file, line and reason of each" if why else line
