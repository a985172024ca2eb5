"""Stage `profile`: what the base model keeps and what that costs, by budget, layer, length, scoring rows."""

from __future__ import annotations

from pathlib import Path

from sparsity_forcing.data.schema import read_rows
from sparsity_forcing.evaluation.profile import (
    Lengths,
    digits_lengths,
    profile_model,
    profile_tables,
    settings_to_profile,
    summarize,
    tercile_lengths,
)
from sparsity_forcing.files import replace_directory, write_json_atomic
from sparsity_forcing.inputs import BASE, VALIDATION, require_inputs
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params
from sparsity_forcing.progress import Progress
from sparsity_forcing.scoring import score_function
from sparsity_forcing.tracking import Tracker

PLOTS, METRICS = Path("plots/profile"), Path("metrics/profile.json")
SUMMARIZED_BY = {
    "by_budget": ["p"],
    "by_layer": ["p", "layer"],
    "by_length": ["length", "p"],
    "by_scoring_rows": ["scoring_rows", "p"],
}


def run(params: Params, root: Path) -> dict:
    """Writes plots/profile/ (four CSV tables; the report draws them) and metrics/profile.json; returns the metrics.

    Raises:
        InputError: an input of the stage is missing.
        ProfileError: there are too few validation rows.
    """
    require_inputs(root, {VALIDATION: "prepare", BASE: "base"})
    tracker = Tracker(params.tracking, root)  # first: a store that cannot be used costs no profile
    score = score_function(params.train.reward.correct)
    model, processor = load(root / BASE, dtype=params.model.dtype, device=params.model.device)
    lengths = _lengths(params, root, processor)
    deployed = params.sparsity.scoring_rows
    points = settings_to_profile(lengths, params.profile, deployed)
    total = sum(len(lengths.groups[point.length]) for point in points)
    with Progress("profile", total) as progress:
        records = profile_model(
            *(model, processor, lengths, points, params.sparsity, score),
            batch_size=params.profile.batch_size,
            max_new_tokens=params.profile.max_new_tokens,
            on_progress=_counting(progress),
        )
    tables = profile_tables(records, lengths.middle, deployed)
    summaries = {name: summarize(table, SUMMARIZED_BY[name]) for name, table in tables.items()}
    setting = {
        "rule": params.sparsity.rule,
        "scoring_rows": deployed,
        "prefill": params.sparsity.prefill,
        "length": lengths.middle,
        "split": "validation",
    }
    with replace_directory(root / PLOTS) as directory:
        for name, table in tables.items():
            table.to_csv(directory / f"{name}.csv", index=False, float_format="%.6g")
    metrics = {"setting": setting, **summaries}
    write_json_atomic(root / METRICS, metrics)
    _log(tracker, root, summaries)
    return metrics


def _lengths(params: Params, root: Path, processor) -> Lengths:
    """Groups of questions by prompt length: new canvases per grid, or thirds of the user's validation rows."""
    if params.data.source == "digits":
        return digits_lengths(params.data.digits, params.profile.grids, params.profile.rows, params.seed)
    return tercile_lengths(read_rows(root / VALIDATION), processor, params.profile.rows, params.seed)


def _counting(progress: Progress):
    done = 0

    def advance(questions: int) -> None:
        nonlocal done
        done += questions
        progress.advance(done)

    return advance


def _log(tracker: Tracker, root: Path, summaries: dict[str, list[dict]]) -> None:
    """One MLflow run; the curves have p in thousandths as their step."""
    with tracker.run(stage="profile", name="profile base", params={"checkpoint": "base"}) as run:
        for point in summaries["by_budget"]:
            names = ("accuracy", "token_ratio", "visual_token_ratio")
            values = {f"profile/{name}": point[name] for name in names if point[name] is not None}
            run.metrics(values, step=round(1000 * point["p"]))
        run.artifact(root / PLOTS, folder="profile")
