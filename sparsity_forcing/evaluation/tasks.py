"""Local lmms-eval tasks, generated from prepared rows: one task per label (``read_8x8``, or the user's task).

A task is a YAML file and a parquet file beside it, in lmms-eval's own format, so its command line runs them too:
``--include_path DIRECTORY --tasks read_8x8``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sparsity_forcing.data.schema import Row
from sparsity_forcing.evaluation import task_functions
from sparsity_forcing.evaluation.table import AVERAGE
from sparsity_forcing.files import replace_directory
from sparsity_forcing.scoring import score_function

_FUNCTIONS = ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results")


class TaskError(ValueError):
    """Rows that cannot become tasks; the message names the task."""


@dataclass(frozen=True)
class LocalTask:
    """``name``: what lmms-eval calls it. ``label``: what results call it. ``questions``: how many it asks."""

    name: str
    label: str
    questions: int


class _Function(str):
    """A dotted name that YAML shows as ``!function name``, the tag lmms-eval reads."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", name))


def write_tasks(
    rows: Iterable[Row], directory: Path, score: str, max_new_tokens: int, limit: int | None = None
) -> tuple[LocalTask, ...]:
    """Writes one task per label of ``rows`` to ``directory``, whole or not at all, in the order of the labels.

    Args:
        score: name of the score function, or ``module:function``.
        limit: at most so many questions per task, the first ones.

    Raises:
        TaskError: no rows, or two labels that differ only in characters a task name cannot hold.
        ScoreError: no such score function.
    """
    score_function(score)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        group = groups.setdefault(row.label, [])
        if limit is None or len(group) < limit:
            group.append(row)
    tasks = tuple(LocalTask(name, label, len(groups[label])) for name, label in _task_names(sorted(groups)).items())
    with replace_directory(directory) as temporary:
        for task in tasks:
            pq.write_table(_documents(groups[task.label], score), temporary / f"{task.name}.parquet")
            text = yaml.dump(_configuration(task.name, max_new_tokens), Dumper=_Dumper, sort_keys=False)
            (temporary / f"{task.name}.yaml").write_text(text, encoding="utf-8")
    return tasks


def _task_names(labels: Iterable[str]) -> dict[str, str]:
    """Task name to label. Task names hold letters, digits, dots, dashes and underscores."""
    names: dict[str, str] = {}
    for label in labels:
        name = re.sub(r"[^\w.-]", "_", label, flags=re.ASCII)
        if label == AVERAGE:
            raise TaskError(f"a task cannot be called {AVERAGE!r}: the table uses it for all questions together")
        if name in names:
            raise TaskError(f"the tasks {names[name]!r} and {label!r} would both be called {name!r}; rename one")
        names[name] = label
    if not names:
        raise TaskError("there are no rows to evaluate; is the test split empty?")
    return names


def _documents(rows: list[Row], score: str) -> pa.Table:
    """A table with the types of `datasets` in it: its image type lets lmms-eval leave images out for the scoring."""
    from datasets import Dataset, Features, Image, List, Value

    text = Value("string")
    features = Features(id=text, task=text, question=text, answer=text, score=text, images=List(Image()))
    records = [
        {
            **{key: getattr(row, key) for key in ("id", "task", "question", "answer")},
            "score": score,
            "images": [{"bytes": image, "path": None} for image in row.images],
        }
        for row in rows
    ]
    return Dataset.from_list(records, features=features).with_format("arrow")[:]


def _configuration(name: str, max_new_tokens: int) -> dict:
    return {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": f"{name}.parquet"}},  # beside the YAML file
        "test_split": "test",
        "output_type": "generate_until",
        **{function: _Function(f"{task_functions.__name__}.{function}") for function in _FUNCTIONS},
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False, "until": []},
        "metric_list": [{"metric": task_functions.METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
