"""Stage `train`: the GRPO stage, from base to policy, resumable."""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from sparsity_forcing.checkpoints import Checkpoints, fingerprint
from sparsity_forcing.data.schema import read_rows
from sparsity_forcing.files import replace_directory, replace_file, write_json_atomic
from sparsity_forcing.inputs import BASE, POLICY, TRAIN, VALIDATION, require_inputs
from sparsity_forcing.lineage import hardware
from sparsity_forcing.models.load import load, pick_device
from sparsity_forcing.params import Params
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.errors import TrainingError, explained_memory
from sparsity_forcing.rl.identity import decisive
from sparsity_forcing.rl.sharding import launched_sharded
from sparsity_forcing.rl.trainer import Trainer
from sparsity_forcing.rl.validation import VALIDATED
from sparsity_forcing.tracking import Run, Tracker

CURVES = Path("plots/train.csv")
CHECKPOINTS = Path("checkpoints/train")


def run(params: Params, root: Path) -> dict:
    """Writes models/policy/, plots/train.csv and metrics/train.json; registers the policy; returns the metrics.

    Under `accelerate launch` every process trains, on the device of its local rank; the main one does the rest.

    Raises:
        InputError: an input of the stage is missing.
        TrainingError, ModelError: the base or the parameters do not allow the training.
    """
    require_inputs(root, {BASE: "base", TRAIN: "prepare", VALIDATION: "prepare"})
    process = PartialState(cpu=pick_device(params.model.device).type == "cpu")
    if launched_sharded() and process.device.type == "cpu":
        raise TrainingError("accelerate shards on accelerators only; on the CPU use presets/accelerate/cpu-2proc.yaml")
    logging.basicConfig(level=logging.INFO if process.is_main_process else logging.ERROR, format="%(message)s")
    tracker = Tracker(params.tracking, root) if process.is_main_process else None
    made_of = decisive(params, root, process.num_processes, launched_sharded())
    checkpoints = Checkpoints(root / CHECKPOINTS, fingerprint(made_of), params.train.keep_checkpoints, made_of)
    with explained_memory("set model.dtype: bfloat16, or train a smaller model"):
        model, processor = load(root / BASE, params.model.dtype, str(process.device))
    with _recorded(tracker, params, root) as record:
        with _Reporter(record, params.train.steps) as report:
            trainer = Trainer(
                model,
                processor,
                read_rows(root / TRAIN),
                read_rows(root / VALIDATION),
                params.train,
                params.sparsity,
                params.seed,
                checkpoints,
                report,
            )
            history = trainer.train()
        metrics = _summary(history, trainer.best, trainer.seconds, params)
        if record is not None:
            version = _hand_back(model, processor, history, metrics, root, tracker, record)
    if record is not None:
        checkpoints.clear()
        print(_sentence(metrics, params, version))
    return metrics


@contextmanager
def _recorded(tracker: Tracker | None, params: Params, root: Path) -> Iterator[Run | None]:
    """The MLflow run of the main process; None in the others."""
    if tracker is None:
        yield None
        return
    config = params.train
    varied = {
        "method": "sparsity_forcing",
        "sparse.p": params.sparsity.p,
        "selection_policy.sigma": config.selection_policy.sigma,
        "selection_policy.final_sigma": config.selection_policy.final_sigma,
        "selection_policy.weight": config.selection_policy.weight,
        "selection_policy.credit": config.selection_policy.credit,
        "reward.efficiency": config.reward.efficiency,
        "reward.target_ratio": config.reward.target_ratio,
        "learning_rate": config.learning_rate,
        "num_generations": config.num_generations,
        "steps": config.steps,
    }
    with tracker.run(stage="train", name="train", params=varied, tags={"prefill": params.sparsity.prefill}) as record:
        for split in (TRAIN, VALIDATION):
            record.dataset(root / split, name=f"{params.data.source}-{split.stem}", split=split.stem)
        yield record


def _hand_back(model, processor, history: list[dict], metrics: dict, root: Path, tracker: Tracker, record: Run) -> str:
    """Writes the outputs and registers the policy; returns its version."""
    with replace_directory(root / POLICY) as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
    with replace_file(root / CURVES) as temporary:
        _curves(history).to_csv(temporary, index=False, float_format="%.6g")
    write_json_atomic(root / "metrics/train.json", metrics)
    record.metrics({f"eval/{name}": metrics["end"][name] for name in VALIDATED})
    record.artifact(root / CURVES)
    return tracker.register_policy(root / POLICY, record.run_id, metrics["end"])


def _sentence(metrics: dict, params: Params, version: str) -> str:
    start, end = metrics["start"], metrics["end"]
    return (
        f"train: {metrics['steps']} steps, {metrics['rollouts']:,} rollouts in {metrics['seconds']:.0f} s; at "
        f"p = {params.sparsity.p} the validation accuracy is {end['accuracy']:.3f}, visual token ratio "
        f"{start['visual_token_ratio']:.3f} -> {end['visual_token_ratio']:.3f}; "
        f"{params.tracking.registered_model} version {version} is {params.tracking.alias!r}"
    )


class _Reporter:
    """Sends every step to the progress display and to MLflow, in the main process; elsewhere it is never called."""

    def __init__(self, record: Run | None, steps: int) -> None:
        self.record, self.progress = record, Progress("train", steps) if record is not None else None

    def __enter__(self) -> _Reporter:
        if self.progress is not None:
            self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.__exit__(*error)

    def __call__(self, metrics: dict, samples: list[dict] | None) -> None:
        step = int(metrics["step"])
        self.record.training_step(metrics)
        self.progress.advance(
            step,
            reward=metrics["reward"],
            accuracy=metrics["accuracy"],
            visual_token_ratio=metrics.get("visual_token_ratio", math.nan),  # a step may ask without images
            tokens_per_second=metrics["new_tokens_per_second"],
        )
        if samples is not None:
            table = pd.DataFrame(samples)
            table["image"] = [_data_url(image) for image in table["image"]]
            self.record.table(table, f"samples/step-{step:06d}.json")


def _data_url(image: bytes | None) -> str:
    kind = "png" if image is not None and image.startswith(b"\x89PNG") else "jpeg"
    return "" if image is None else f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _curves(history: list[dict]) -> pd.DataFrame:
    """One line per step; validation columns are blank between validations."""
    return pd.DataFrame(history)


def _summary(history: list[dict], best: dict | None, seconds: float, params: Params) -> dict:
    """metrics/train.json. ``seconds``: of all processes that the training took, ``step_seconds`` without validation."""
    validated = [row for row in history if "validation_accuracy" in row]
    first, last = history[0], validated[-1]
    chosen = best or {"step": len(history), **{name: last[f"validation_{name}"] for name in VALIDATED}}
    return {
        "steps": len(history),
        "rollouts": int(sum(row["rollouts"] for row in history)),
        "prompt_tokens": int(sum(row["prompt_tokens"] for row in history)),
        "new_tokens": int(sum(row["new_tokens"] for row in history)),
        "seconds": round(seconds, 1),
        "step_seconds": round(sum(row["seconds"] for row in history), 1),
        "new_tokens_per_second": sum(r["new_tokens"] for r in history) / sum(r["seconds_rollout"] for r in history),
        "start": {name: first[f"start_{name}"] for name in VALIDATED},
        "end": {name: chosen[name] for name in VALIDATED},
        "policy_step": chosen["step"],
        "replay_max_difference": max(row.get("replay_max_difference", 0.0) for row in history),
        "skipped_steps": int(history[-1]["skipped_steps"]),
        "seed": params.seed,
        "device": hardware(),
    }
