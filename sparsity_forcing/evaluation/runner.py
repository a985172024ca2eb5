"""Runs the rows of the comparison through lmms-eval's evaluator.

The rows are divided over processes, each of which imports lmms-eval and loads one checkpoint, once, on a GPU of its own
where there are several. A finished row is kept on disk under the fingerprint of everything it depends on, so that a run
that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import sparsity_kernels
import torch

from sparsity_forcing.evaluation.samples import read_records, sample_records, write_samples
from sparsity_forcing.evaluation.tasks import LocalTask
from sparsity_forcing.evaluation.workers import run_in_processes
from sparsity_forcing.lineage import code_digest, file_digest, versions
from sparsity_forcing.methods import Method

# What decides an answer and its score, and the packages that do.
CODE = (
    *("attention", "data/schema.py", "evaluation", "methods", "models", "params", "scoring.py", "selection"),
    Path(sparsity_kernels.__file__).parent,
)
PACKAGES = ("lmms_eval", "torch", "transformers")
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One row: a checkpoint (``base`` or ``policy``), its directory, and the method it runs under."""

    checkpoint: str
    directory: Path
    method: Method

    @property
    def title(self) -> str:
        return f"{self.checkpoint} {self.method.name} p={self.method.p:g}"

    @property
    def row(self) -> dict[str, object]:
        """What every sample of the row shares."""
        return {"method": self.method.name, "checkpoint": self.checkpoint, "p": self.method.p}


@dataclass(frozen=True)
class Benchmark:
    """The tasks in ``directory`` and how they are run.

    ``digest`` stands for the tasks' content: equal digests mean equal questions and scoring, the user's own score
    function included.
    """

    directory: Path
    tasks: tuple[LocalTask, ...]
    digest: str
    batch_size: int
    dtype: str = "float32"
    device: str = "auto"

    @property
    def questions(self) -> int:
        return sum(task.questions for task in self.tasks)


@dataclass(frozen=True)
class Advance:
    """``questions`` more of the row ``title`` are answered; ``done`` says how, once all are."""

    title: str
    questions: int
    done: str | None = None


def evaluate_rows(
    jobs: Sequence[Job], benchmark: Benchmark, cache: Path, workers: int, on_progress: Callable[[Advance], None]
) -> list[dict]:
    """Per-question records of all jobs, in their order (see `evaluation.samples`).

    ``cache`` keeps finished rows; the caller removes it once the final outputs are written.

    Raises:
        WorkerError: a row failed; finished rows stay in ``cache``.
    """
    results = {job: cache / "rows" / f"{fingerprint(job, benchmark)}.parquet" for job in jobs}
    missing: dict[str, list[tuple[Job, Path]]] = {}
    for job, path in results.items():
        if path.is_file():
            on_progress(Advance(job.title, benchmark.questions, done="kept from the run before"))
        else:
            missing.setdefault(job.checkpoint, []).append((job, path))
    groups = [(share, place, benchmark, cache) for place, share in enumerate(shares(missing.values(), workers))]
    run_in_processes(_evaluate_share, groups, on_progress, processes=workers)
    return [record for path in results.values() for record in read_records(path)]


def fingerprint(job: Job, benchmark: Benchmark) -> str:
    """Stands for everything the samples of a row depend on: weights, questions, method, settings, code, versions."""
    depends_on = {
        "row": job.row,
        "method": {key: _plain(value) for key, value in vars(job.method).items()},
        "model": {path.name: file_digest(path, "sha256") for path in job.directory.iterdir() if path.is_file()},
        "benchmark": benchmark.digest,
        "settings": [benchmark.batch_size, benchmark.dtype, benchmark.device],
        "code": code_digest(CODE),
        "versions": versions(PACKAGES),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def _plain(value: object) -> object:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def shares(groups: Collection[Sequence[T]], workers: int) -> list[Sequence[T]]:
    """Every group, dealt out to its workers: one each, and every further one where a worker has most."""
    parts = [1] * len(groups)
    while sum(parts) < min(workers, sum(map(len, groups))):
        each = [len(group) / own for group, own in zip(groups, parts, strict=True)]
        parts[each.index(max(each))] += 1
    return [group[place::own] for group, own in zip(groups, parts, strict=True) for place in range(own)]


def device_at(place: int, device: str) -> str:
    """Where the process at ``place`` computes: in turn on every GPU, if ``device`` leaves open on which."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return f"cuda:{place % count}" if count > 1 else device


def _evaluate_share(
    share: Sequence[tuple[Job, Path]],
    place: int,
    benchmark: Benchmark,
    cache: Path,
    report: Callable[[Advance], None],
) -> None:
    """Rows of one checkpoint, in a process of their own."""
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(cache / "datasets")  # in the workspace, not in the home directory
    os.environ["TQDM_DELAY"] = "1e9"  # no bars of lmms-eval's own: those of several processes would mix
    from sparsity_forcing.models.load import load

    device = device_at(place, benchmark.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    model, processor = load(share[0][0].directory, dtype=benchmark.dtype, device=device)
    for job, path in share:
        started = time.perf_counter()
        advance = partial(_advance, report, job.title)
        samples = evaluate_model(model, processor, job.method, benchmark, advance)
        write_samples(sample_records(samples, benchmark.tasks, job.row), path)
        report(Advance(job.title, 0, done=f"in {time.perf_counter() - started:.0f} s"))


def _advance(report: Callable[[Advance], None], title: str, questions: int) -> None:
    report(Advance(title, questions))


def evaluate_model(
    model, processor, method: Method, benchmark: Benchmark, on_progress: Callable[[int], None] | None = None
) -> Mapping[str, list[dict]]:
    """lmms-eval's samples of a loaded model, by task."""
    from argparse import Namespace

    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from sparsity_forcing.evaluation.lmms_model import LoadedModel

    results = simple_evaluate(
        LoadedModel(model, processor, method, benchmark.batch_size, on_progress=on_progress),
        tasks=[task.name for task in benchmark.tasks],
        task_manager=TaskManager(include_path=str(benchmark.directory), include_defaults=False),
        bootstrap_iters=0,  # intervals are ours, over the pooled questions
        cli_args=Namespace(process_with_media=False),  # scoring needs no images
        process_docs_parallel=1,
    )
    return results["samples"]
