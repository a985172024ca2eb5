"""Stage `evaluate`: base and policy, dense and sparse, through lmms-eval's evaluator on the held-out split."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pandas as pd
from rich.console import Console

from sparsity_forcing.data.schema import read_rows
from sparsity_forcing.evaluation.runner import Advance, Benchmark, Job, evaluate_rows
from sparsity_forcing.evaluation.samples import read_samples, write_samples
from sparsity_forcing.evaluation.table import AVERAGE, BenchmarkTable, benchmark_table, rich_table
from sparsity_forcing.evaluation.tasks import write_tasks
from sparsity_forcing.files import write_json_atomic
from sparsity_forcing.inputs import BASE, MODELS, POLICY, TEST, require_inputs
from sparsity_forcing.lineage import code_digest, file_digest
from sparsity_forcing.methods import rows_to_compare
from sparsity_forcing.params import Params
from sparsity_forcing.progress import Progress
from sparsity_forcing.scoring import score_code
from sparsity_forcing.tracking import Tracker

TASKS, SAMPLES, METRICS = Path("evaluation/tasks"), Path("evaluation/samples.parquet"), Path("metrics/evaluate.json")
MEASURES = ("accuracy", "accuracy_low", "accuracy_high", "token_ratio", "visual_token_ratio")
CACHE = Path(".cache/evaluate")  # finished rows of a run that was killed


def run(params: Params, root: Path) -> dict:
    """Writes evaluation/tasks/, evaluation/samples.parquet and metrics/evaluate.json; returns the table.

    Raises:
        InputError: an input of the stage is missing.
        WorkerError: a row failed; the rows that are done are kept for the next run.
    """
    require_inputs(root, {TEST: "prepare", BASE: "base", POLICY: "train"})
    tracker = Tracker(params.tracking, root)  # first: a store that cannot be used costs no evaluation
    benchmark = write_benchmark(params, root)
    methods = rows_to_compare(params.sparsity, params.evaluate.budgets, params.evaluate.baselines)
    jobs = [Job(name, root / directory, method) for name, directory in MODELS.items() for method in methods]
    with Progress("evaluate", len(jobs) * benchmark.questions) as progress:
        show = _Shown(progress)
        records = evaluate_rows(jobs, benchmark, root / CACHE, params.evaluate.workers, show.advance)
    write_samples(records, root / SAMPLES)
    samples = read_samples(root / SAMPLES)
    table = benchmark_table(samples)
    log_rows(tracker, table, samples, root)
    metrics = table.model_dump(mode="json")
    write_json_atomic(root / METRICS, metrics)
    shutil.rmtree(root / CACHE, ignore_errors=True)
    Console().print(rich_table(table))
    return metrics


def write_benchmark(params: Params, root: Path) -> Benchmark:
    """Writes the tasks of the held-out split."""
    settings = {
        "score": params.train.reward.correct,
        "max_new_tokens": params.evaluate.max_new_tokens,
        "limit": params.evaluate.limit,
    }
    tasks = write_tasks(read_rows(root / TEST), root / TASKS, **settings)
    content = [file_digest(root / TEST, "sha256"), settings, code_digest(score_code(settings["score"]))]
    return Benchmark(
        directory=root / TASKS,
        tasks=tasks,
        digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        batch_size=params.evaluate.batch_size,
        dtype=params.model.dtype,
        device=params.model.device,
    )


class _Shown:
    """Counts what the workers report."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.questions, self.rows = progress, 0, 0

    def advance(self, step: Advance) -> None:
        self.questions += step.questions
        if step.done is not None:
            self.rows += 1
            print(f"evaluate: {step.title}: {step.done}")
        self.progress.advance(self.questions, rows=self.rows)


def log_rows(tracker: Tracker, table: BenchmarkTable, samples: pd.DataFrame, root: Path) -> None:
    """One flat MLflow run per method, checkpoint and budget, so that the UI can compare them."""
    for row in table.averages():
        keys = [row.method, row.checkpoint, row.p]
        by_task = [found for found in table.rows if [found.method, found.checkpoint, found.p] == keys]
        metrics = {f"eval/{found.benchmark}": found.accuracy for found in by_task if found.benchmark != AVERAGE}
        metrics |= {f"eval/{name}": getattr(row, name) for name in MEASURES if getattr(row, name) is not None}
        params = {"method": row.method, "checkpoint": row.checkpoint, "sparse.p": row.p}
        name = f"{row.checkpoint} {row.method} p={row.p:g}"
        with tracker.run(stage="evaluate", name=name, params=params, tags={"questions": row.n}) as run:
            run.metrics(metrics)
            run.dataset(root / TEST, name="test", split="test")
            mine = samples[(samples[["method", "checkpoint", "p"]] == keys).all(axis=1)]
            run.table(wrong_answers(mine), "wrong_answers.json")


def wrong_answers(samples: pd.DataFrame, most: int = 100) -> pd.DataFrame:
    """The first questions that were not fully right: what a person looks at first."""
    columns = ["benchmark", "id", "question", "answer", "prediction", "score", "token_ratio", "visual_token_ratio"]
    return samples.loc[samples["score"] < 1.0, columns].head(most)
