"""Per-question results: out of the evaluator's samples, in and out of parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sparsity_forcing.evaluation.task_functions import METRIC
from sparsity_forcing.evaluation.tasks import LocalTask
from sparsity_forcing.files import replace_file

_RATIOS = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("checkpoint", pa.string()),
        ("p", pa.float64()),
        ("benchmark", pa.string()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("prediction", pa.string()),
        ("score", pa.float64()),
        ("prompt_tokens", pa.int64()),
        ("visual_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
        ("token_ratio", pa.float64()),
        ("visual_token_ratio", pa.float64()),  # null without visual tokens, as is the list by layer
        ("layer_ratio", _RATIOS),
        ("layer_visual_ratio", _RATIOS),
    ]
)


def sample_records(
    samples: Mapping[str, list[dict]], tasks: Iterable[LocalTask], row: Mapping[str, object]
) -> list[dict]:
    """One record per question, in the order of the tasks and their documents.

    Args:
        samples: ``results["samples"]`` of lmms-eval.
        row: what the whole row shares: method, checkpoint, p.
    """
    records = []
    for task in tasks:
        for sample in sorted(samples[task.name], key=lambda sample: sample["doc_id"]):
            counts = sample["token_counts"][0]
            document = {key: sample["doc"][key] for key in ("id", "task", "question", "answer")}
            measured = {
                "prediction": sample["filtered_resps"][0],
                "score": float(sample[METRIC]),
                "prompt_tokens": counts["input_tokens"],
                "new_tokens": counts["output_tokens"],
            }
            kept = {key: counts[key] for key in SCHEMA.names if key in counts}
            records.append({**row, "benchmark": task.label, **document, **measured, **kept})
    return records


def write_samples(records: Iterable[Mapping[str, object]], path: Path) -> None:
    """Writes records to parquet, whole or not at all; the same records give the same bytes."""
    table = pa.Table.from_pylist(list(records), schema=SCHEMA)
    with replace_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_samples(path: Path) -> pd.DataFrame:
    """The samples as a frame; ratios by layer are arrays."""
    return pq.read_table(path, schema=SCHEMA).to_pandas()


def read_records(path: Path) -> list[dict]:
    """The samples as records, as `write_samples` takes them."""
    return pq.read_table(path, schema=SCHEMA).to_pylist()
