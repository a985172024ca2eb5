"""Stage `report`: one page that says what was measured, for a manager and an engineer alike."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sparsity_forcing.evidence.summary import evidence_section
from sparsity_forcing.files import json_text, replace_file
from sparsity_forcing.lineage import read_lineage
from sparsity_forcing.params import Params
from sparsity_forcing.reporting.build import build_report, write_report
from sparsity_forcing.reporting.content import DENSE_ARM, POLICY_ARM, Headline, Measured, find_headline, headline_text
from sparsity_forcing.reporting.inputs import read_inputs
from sparsity_forcing.reporting.measuring import measure_all
from sparsity_forcing.tracking import Tracker


def run(params: Params, root: Path) -> dict:
    """Writes reports/ (index.html, index.md, figures/) and metrics/report.json; returns the metrics.

    The two are written together: if one cannot be, both are as they were before.

    Raises:
        TableError: metrics/evaluate.json is missing or damaged.
        ReportError: a file cannot be read, or the evaluation does not fit params.yaml.
    """
    tracker = Tracker(params.tracking, root)
    inputs = read_inputs(root)
    found = find_headline(inputs.table, params, inputs.samples)
    console = Console()
    measured, example_ids = measure_all(params, root, inputs, lambda text: console.print(f"report: {text}"))
    metrics = report_metrics(found, measured)
    run_ids = tracker.latest_runs("evaluate")
    links = []
    if run_ids:
        links = [("Compare the evaluation runs in MLflow", tracker.compare_url(run_ids))]
        links.append(("All runs of this experiment", tracker.experiment_url()))
    lineage, more = read_lineage(root, "report"), [evidence_section(params, root)]
    report = build_report(params, inputs, found, measured, example_ids, lineage, links, run_ids, more)
    folder, metrics_path = root / "reports", root / "metrics/report.json"
    with tracker.run(stage="report", name="report", params={"sparse.p": params.sparsity.p}) as run:
        with replace_file(metrics_path) as temporary:
            temporary.write_text(json_text(metrics, metrics_path), encoding="utf-8")
            write_report(report, folder)
        run.metrics(bench_metrics(metrics))
        run.artifact(folder, folder="report")
    console.print(headline_text(found), highlight=False)
    console.print(f"report: {folder / 'index.html'}", highlight=False, soft_wrap=True)
    return metrics


def report_metrics(found: Headline, measured: Measured) -> dict:
    """What metrics/report.json holds. ``decode`` and ``cache_bytes`` compare the policy with the dense base at the
    longest prompt that the evaluation covers; ``efficiency`` has every arm at every length."""
    metrics = {"headline": found.numbers(), "hardware": measured.hardware, "not_measured": measured.missing}
    if measured.main is None:
        return metrics
    dense, sparse = measured.main["arms"][DENSE_ARM], measured.main["arms"][POLICY_ARM]
    metrics["decode"] = {
        "dense_ms_per_token": dense["decode_ms_per_token"]["median"],
        "sparse_ms_per_token": sparse["decode_ms_per_token"]["median"],
        "ratio": sparse["decode_ratio"]["median"],
        **{key: measured.main[key] for key in ("visual_tokens", "prompt_tokens", "batch", "new_tokens", "repetitions")},
    }
    metrics["cache_bytes"] = {
        "dense": dense["cache_bytes"],
        "sparse": sparse["cache_bytes"],
        "ratio": sparse["cache_ratio"],
    }
    metrics["efficiency"] = {f"visual_tokens_{length['visual_tokens']}": length for length in measured.lengths}
    return metrics


def bench_metrics(metrics: dict) -> dict[str, float]:
    """The same numbers under MLflow's names: ``bench/*`` of the length quoted, ``bench/visual_tokens_N/*`` of each."""
    values = {f"bench/headline/{name}": value for name, value in metrics["headline"].items()}
    if "decode" in metrics:
        values["bench/decode_speedup"] = 1 / metrics["decode"]["ratio"]
        values["bench/cache_ratio"] = metrics["cache_bytes"]["ratio"]
    for length, measured in metrics.get("efficiency", {}).items():
        arm = measured["arms"][POLICY_ARM]
        values[f"bench/{length}/decode_speedup"] = 1 / arm["decode_ratio"]["median"]
        values[f"bench/{length}/prefill_ratio"] = arm["prefill_ratio"]["median"]
        values[f"bench/{length}/cache_ratio"] = arm["cache_ratio"]
    return values
