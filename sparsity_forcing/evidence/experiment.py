"""One arm: trained from the pipeline's base, then judged on the held-out questions. Resumable; done arms stay done."""

from __future__ import annotations

import json
from pathlib import Path

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.checkpoints import Checkpoints, fingerprint
from sparsity_forcing.data.schema import Row, read_rows
from sparsity_forcing.evidence.arms import Arm
from sparsity_forcing.files import write_json_atomic
from sparsity_forcing.lineage import file_digest, git_state, hardware
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.sampler import Sampler
from sparsity_forcing.rl.trainer import Trainer
from sparsity_forcing.rl.validation import VALIDATED, answered
from sparsity_forcing.scoring import score_function
from sparsity_forcing.stages.evaluate import TEST
from sparsity_forcing.stages.inputs import require_inputs
from sparsity_forcing.stages.train import BASE, TRAIN, VALIDATION, identity
from sparsity_forcing.tracking import Run, Tracker

RESULTS = Path("metrics/evidence")
CHECKPOINTS = Path("checkpoints/evidence")
DENSE = 1.0


def run_arm(arm: Arm, params: Params, root: Path) -> dict:
    """Writes metrics/evidence/NAME.json, unless one of the same code, data and parameters is there; returns it.

    Raises:
        InputError: the pipeline has not made the base and the data yet.
        TrainingError, ModelError: the base does not allow the training.
    """
    require_inputs(root, {BASE: "base", TRAIN: "prepare", VALIDATION: "prepare", TEST: "prepare"})
    own = arm.params(params)
    made_by = fingerprint([identity(own, root, 1), arm.rows, file_digest(root / TEST, "sha256")])
    path = root / RESULTS / f"{arm.name}.json"
    if (done := _read(path)) is not None and done["made_by"] == made_by:
        return done
    model, processor = load(root / BASE, own.model.dtype, own.model.device)
    checkpoints = Checkpoints(root / CHECKPOINTS / arm.name, made_by)
    rows, validation = read_rows(root / TRAIN), read_rows(root / VALIDATION)
    if arm.rows == "hard":
        rows = wrongly_answered(model, processor, rows, own)
    tags = {"arm": arm.name, "question": arm.question}
    with Tracker(own.tracking, root).run("evidence", arm.name, {"arm": arm.name, "seed": own.seed}, tags) as record:
        with Progress(arm.name, own.train.steps) as progress:
            report = _report(record, progress)
            trainer = Trainer(
                model, processor, rows, validation, own.train, own.sparsity, own.seed, checkpoints, report
            )
            history = trainer.train()
        found = {
            "name": arm.name,
            "question": arm.question,
            "made_by": made_by,
            "commit": git_state(root).commit,
            "hardware": hardware(),
            "seed": own.seed,
            "changed": {"train": arm.train, "sparsity": arm.sparsity, "rows": arm.rows},
            "training_rows": len(rows),
            "rollouts": int(sum(row["rollouts"] for row in history)),
            "seconds": round(trainer.seconds, 1),
            "policy_step": trainer.best["step"] if trainer.best else len(history),
            "within_guard": trainer.best is not None,
            "replay_max_difference": max(row["replay_max_difference"] for row in history),
            "skipped_steps": int(history[-1]["skipped_steps"]),
            "curve": curve(history),
            "test": judged(model, processor, own, root),
        }
        record.metrics({f"eval/{name}": found["test"][str(own.sparsity.p)][name] for name in VALIDATED})
        write_json_atomic(path, found)
        record.artifact(path)
    checkpoints.clear()
    return found


def run_base(params: Params, root: Path) -> dict:
    """As `run_arm` for the base, which needs no training: metrics/evidence/base.json."""
    require_inputs(root, {BASE: "base", TEST: "prepare"})
    files = [path for path in (root / BASE).rglob("*") if path.is_file()]
    made_by = fingerprint([params.sparsity.model_dump(), params.train.reward.correct], (*files, root / TEST))
    path = root / RESULTS / "base.json"
    if (done := _read(path)) is not None and done["made_by"] == made_by:
        return done
    model, processor = load(root / BASE, params.model.dtype, params.model.device)
    found = {"name": "base", "made_by": made_by, "test": judged(model, processor, params, root)}
    write_json_atomic(path, found)
    return found


def judged(model, processor, params: Params, root: Path) -> dict[str, dict]:
    """Results on the test split by budget: the deployed one, the evaluated ones and dense attention.

    ``scores`` holds a character per question, "1" where it is right, so that two models are compared question by
    question.
    """
    rows, score = read_rows(root / TEST), score_function(params.train.reward.correct)
    budgets = sorted({params.sparsity.p, *params.evaluate.budgets, DENSE})
    found = {}
    with decoder_attention(model):
        for p in budgets:
            answers = answered(_sampler(model, processor, params, p), rows, score)
            means = dict(zip(VALIDATED, answers.mean(0).tolist(), strict=True))
            scores = "".join("1" if value > 0.5 else "0" for value in answers[:, 0])
            found[str(p)] = {**means, "questions": len(rows), "scores": scores}
    return found


def wrongly_answered(model, processor, rows: list[Row], params: Params) -> list[Row]:
    """The rows whose greedy answer with dense attention is wrong."""
    score = score_function(params.train.reward.correct)
    with decoder_attention(model):
        answers = answered(_sampler(model, processor, params, DENSE), rows, score)
    return [row for row, right in zip(rows, answers[:, 0] > 0.5, strict=True) if not right]


def curve(history: list[dict]) -> list[dict]:
    """Accuracy and ratios of the validations, the start as step 0."""
    start = {"step": 0, **{name: history[0][f"start_{name}"] for name in VALIDATED}}
    later = [
        {"step": row["step"], **{name: row[f"validation_{name}"] for name in VALIDATED}}
        for row in history
        if "validation_accuracy" in row
    ]
    return [start, *later]


def _sampler(model, processor, params: Params, p: float) -> Sampler:
    return Sampler(model, processor, params.train, params.sparsity.model_copy(update={"p": p}))


def _report(record: Run, progress: Progress):
    def report(metrics: dict, table: list[dict] | None) -> None:
        step = int(metrics["step"])
        names = {f"train/{name.replace('/', '_')}": value for name, value in metrics.items() if name != "step"}
        record.metrics(names, step=step)
        progress.advance(step, accuracy=metrics["accuracy"], visual_token_ratio=metrics["visual_token_ratio"])

    return report


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
