"""Runs the measurements that only the report needs, on the two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from sparsity_forcing.data.digits import load_scans, render
from sparsity_forcing.data.schema import Row
from sparsity_forcing.inputs import MODELS, TEST
from sparsity_forcing.lineage import hardware
from sparsity_forcing.methods import Full, Method, sparse_method
from sparsity_forcing.models.families import visual_token_ids
from sparsity_forcing.models.load import load
from sparsity_forcing.models.prompts import encode_prompts, pixels, to_device
from sparsity_forcing.params import Params
from sparsity_forcing.reporting.content import BASE_ARM, DENSE_ARM, POLICY_ARM, Measured
from sparsity_forcing.reporting.efficiency import Arm, measure, summarise
from sparsity_forcing.reporting.inputs import Inputs
from sparsity_forcing.reporting.kept import first_of_each, measure_kept

Say = Callable[[str], None]


def measure_all(params: Params, root: Path, inputs: Inputs, say: Say) -> tuple[Measured, list[str]]:
    """Kept sets and efficiency of base and policy, and the row ids of the examples.

    Where a checkpoint or the test split is missing nothing is measured and the reason is kept.
    """
    needed = [path.as_posix() for path in (*MODELS.values(), TEST)]
    reasons = [inputs.missing[name] for name in needed if name in inputs.missing]
    if reasons:
        return Measured(hardware(), missing=dict.fromkeys(("kept", "efficiency"), "; ".join(reasons))), []
    models = {}
    for name, directory in MODELS.items():
        models[name], processor = load(root / directory, dtype=params.model.dtype, device=params.model.device)
    method = sparse_method(params.sparsity, params.sparsity.p)
    examples = first_of_each(inputs.test_rows, params.report.examples, key=lambda row: row.task)
    rows = {row.id: row for row in (*examples, *first_of_each(inputs.test_rows, params.report.kept_rows, label_of))}
    kept = {}
    for name, model in models.items():
        say(f"kept sets of the {name}, {len(rows)} questions")
        kept[name] = measure_kept(model, processor, list(rows.values()), method, params.evaluate.max_new_tokens)
    lengths = measure_lengths(params, models, processor, inputs.test_rows, method, say)
    evaluated = None if inputs.samples is None else int(inputs.samples["visual_tokens"].max())
    return Measured(hardware(), kept, lengths, evaluated), [row.id for row in examples]


def label_of(row: Row) -> str:
    return row.label


def measure_lengths(
    params: Params,
    models: dict[str, PreTrainedModel],
    processor: ProcessorMixin,
    rows: Sequence[Row],
    method: Method,
    say: Say,
) -> list[dict]:
    """Efficiency at every prompt length, ascending; see `content.Measured`."""
    arms = [
        Arm(DENSE_ARM, models["base"], Full()),
        Arm(BASE_ARM, models["base"], method),
        Arm(POLICY_ARM, models["policy"], method),
    ]
    lengths = []
    for questions, images in decode_prompts(params, rows):
        inputs = encode_prompts(processor, questions, images)
        visual = sum((inputs["input_ids"] == token).sum(-1) for token in visual_token_ids(models["base"].config))
        shape = {
            "visual_tokens": round(visual.float().mean().item()),
            "prompt_tokens": int(inputs["attention_mask"].sum(-1).max()),
            "batch": len(questions),
            "new_tokens": params.report.decode_tokens,
            "repetitions": params.report.decode_repetitions,
        }
        say(f"decode time at {shape['visual_tokens']} visual tokens, batch {shape['batch']}")
        inputs = to_device(inputs, models["base"])
        samples = measure(arms, inputs, params.report.decode_tokens, params.report.decode_repetitions)
        lengths.append({**shape, "arms": summarise(samples, DENSE_ARM)})
    return sorted(lengths, key=lambda length: length["visual_tokens"])


def decode_prompts(params: Params, rows: Sequence[Row]) -> list[tuple[list[str], list[list[bytes | Image.Image]]]]:
    """Batches of (questions, images): one per grid of the digits source, or the user's largest prompts."""
    size = params.report.decode_batch_size
    if params.data.source != "digits":
        largest = sorted(rows, key=lambda row: pixels(row.images))
        chosen = largest[-size:]
        return [([row.question for row in chosen], [list(row.images) for row in chosen])]
    digits, scans = params.data.digits, load_scans("test")
    batches = []
    for grid in params.report.decode_grids:
        rng = np.random.default_rng([params.seed, grid])
        tasks = [digits.tasks[i % len(digits.tasks)] for i in range(size)]
        canvases = [render(rng, scans, grid, task, digits.grey_share, digits.clutter_share) for task in tasks]
        batches.append(([c.question for c in canvases], [[Image.fromarray(c.pixels)] for c in canvases]))
    return batches
