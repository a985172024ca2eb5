"""Stage `train`: the GRPO stage, from base to policy, resumable."""

from __future__ import annotations

import base64
import logging
import math
import time
from pathlib import Path

import pandas as pd

from sparsity_forcing.checkpoints import Checkpoints, fingerprint
from sparsity_forcing.data.schema import read_rows
from sparsity_forcing.files import replace_directory, replace_file, write_json_atomic
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.trainer import Trainer
from sparsity_forcing.stages.inputs import require_inputs
from sparsity_forcing.tracking import Run, Tracker

TRAIN, VALIDATION = Path("data/prepared/train.parquet"), Path("data/prepared/validation.parquet")
BASE, POLICY = Path("models/base"), Path("models/policy")
CURVES = Path("plots/train.csv")
CHECKPOINTS = Path("checkpoints/train")
VALIDATED = ("accuracy", "token_ratio", "visual_token_ratio")


def run(params: Params, root: Path) -> dict:
    """Writes models/policy/, plots/train.csv and metrics/train.json; registers the policy; returns the metrics.

    Raises:
        InputError: an input of the stage is missing.
        TrainingError, ModelError: the base or the parameters do not allow the training.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = params.train
    require_inputs(root, {BASE: "base", TRAIN: "prepare", VALIDATION: "prepare"})
    base_files = tuple((root / BASE).glob("*.safetensors"))
    settings = {
        "train": config.model_dump(),
        "sparsity": params.sparsity.model_dump(),
        "seed": params.seed,
        "dtype": params.model.dtype,
    }
    identity = fingerprint(settings, (*base_files, root / TRAIN, root / VALIDATION))
    model, processor = load(root / BASE, params.model.dtype, params.model.device)
    tracker = Tracker(params.tracking, root)
    varied = {
        "method": "sparsity_forcing",
        "sparse.p": params.sparsity.p,
        "selection_policy.sigma": config.selection_policy.sigma,
        "selection_policy.weight": config.selection_policy.weight,
        "learning_rate": config.learning_rate,
        "num_generations": config.num_generations,
        "steps": config.steps,
    }
    started = time.perf_counter()
    with tracker.run(stage="train", name="train", params=varied, tags={"prefill": params.sparsity.prefill}) as record:
        for split in (TRAIN, VALIDATION):
            record.dataset(root / split, name=f"{params.data.source}-{split.stem}", split=split.stem)
        with Progress("train", config.steps) as progress:
            reporter = _Reporter(record, progress)
            trainer = Trainer(
                model,
                processor,
                read_rows(root / TRAIN),
                read_rows(root / VALIDATION),
                config,
                params.sparsity,
                params.seed,
                Checkpoints(root / CHECKPOINTS, identity, config.keep_checkpoints),
                reporter,
            )
            history = trainer.train()
        metrics = _summary(history, trainer.best, time.perf_counter() - started, params)
        if trainer.accelerator.is_main_process:
            with replace_directory(root / POLICY) as directory:
                model.save_pretrained(directory)
                processor.save_pretrained(directory)
            with replace_file(root / CURVES) as temporary:
                _curves(history).to_csv(temporary, index=False, float_format="%.6g")
            write_json_atomic(root / "metrics/train.json", metrics)
            record.metrics({f"eval/{name}": metrics["end"][name] for name in VALIDATED})
            record.artifact(root / CURVES)
            version = tracker.register_policy(root / POLICY, record.run_id, metrics["end"])
            trainer.checkpoints.clear()
            print(_sentence(metrics, params, version))
    return metrics


def _sentence(metrics: dict, params: Params, version: str) -> str:
    start, end = metrics["start"], metrics["end"]
    return (
        f"train: {metrics['steps']} steps, {metrics['rollouts']:,} rollouts in {metrics['seconds']:.0f} s; at "
        f"p = {params.sparsity.p} the validation accuracy is {end['accuracy']:.3f}, visual token ratio "
        f"{start['visual_token_ratio']:.3f} -> {end['visual_token_ratio']:.3f}; "
        f"{params.tracking.registered_model} version {version} is {params.tracking.alias!r}"
    )


class _Reporter:
    """Sends every step to the progress display and to MLflow."""

    def __init__(self, record: Run, progress: Progress) -> None:
        self.record, self.progress = record, progress

    def __call__(self, metrics: dict, samples: list[dict] | None) -> None:
        step = int(metrics["step"])
        names = {f"train/{name.replace('/', '_')}": value for name, value in metrics.items() if name != "step"}
        self.record.metrics(names, step=step)
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
    """metrics/train.json. ``seconds`` counts this process; the steps' own times survive a resume."""
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
        "device": params.model.device,
    }
