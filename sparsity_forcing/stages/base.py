"""Stage `base`: the model that everything starts from, trained here from scratch or taken as it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from sparsity_forcing.checkpoints import Checkpoints
from sparsity_forcing.data.digits import corpus
from sparsity_forcing.evaluation.intervals import wilson_interval
from sparsity_forcing.files import replace_directory, write_json_atomic
from sparsity_forcing.inputs import BASE
from sparsity_forcing.models.adopt import adopt, describe
from sparsity_forcing.models.families import ModelError
from sparsity_forcing.models.load import pick_device
from sparsity_forcing.models.pretrain import Step, configuration_fingerprint, pretrain
from sparsity_forcing.models.tiny import build_model, build_processor
from sparsity_forcing.models.validate import validate, validation_questions
from sparsity_forcing.params import Params
from sparsity_forcing.progress import Progress
from sparsity_forcing.tracking import Run, Tracker

CHECKPOINTS = Path("checkpoints/base")
LOG_EVERY = 10  # steps between two points of a curve


def run(params: Params, root: Path) -> dict:
    """Writes models/base/ and metrics/base.json; returns the metrics.

    Raises:
        ModelError: the model to take is not usable, or the trained one is below model.min_accuracy; models/base/ is
            then as it was before.
    """
    make = _train if params.model.name == "scratch" else _take
    with Tracker(params.tracking, root).run(
        stage="base", name=f"base {params.model.name}", params={"model.name": params.model.name, "seed": params.seed}
    ) as run:
        metrics = {"name": params.model.name, **make(params, root, run)}
        write_json_atomic(root / "metrics/base.json", metrics)
        run.metrics({"base/parameters": metrics["parameters"]})
        run.artifact(root / BASE / "config.json")
    shutil.rmtree(root / CHECKPOINTS, ignore_errors=True)  # only now: a failure above costs no training
    return metrics


def _take(params: Params, root: Path, run: Run) -> dict:
    name = params.model.name
    local = root / Path(name).expanduser()
    with replace_directory(root / BASE) as directory:
        metrics = adopt(str(local) if local.exists() else name, directory)
    print(f"base: {name} ({metrics['family']}, {metrics['parameters']:,} parameters) is in {BASE}")
    return metrics


def _train(params: Params, root: Path, run: Run) -> dict:
    processor = build_processor(corpus())
    model = build_model(params.model.scratch, processor.tokenizer, params.seed)
    key = configuration_fingerprint(model, processor, params.model, params.seed)
    checkpoints = Checkpoints(root / CHECKPOINTS, key)
    model.to(pick_device(params.model.device))
    steps, seconds = _pretrain_with_progress(model, processor, params, checkpoints, run)

    rows = validation_questions(params.model.curriculum[-1], params.model.validation_rows, params.seed)
    scores = validate(model, processor, rows)
    validation = _accuracy([score for of_label in scores.values() for score in of_label])
    validation["tasks"] = {label: _accuracy(of_label) for label, of_label in scores.items()}
    run.metrics({"eval/accuracy": validation["accuracy"]})
    run.metrics({f"eval/{label}": found["accuracy"] for label, found in validation["tasks"].items()})
    print(
        f"base: {validation['accuracy']:.1%} right on {validation['n']} questions about held-out scans "
        f"(95% interval {validation['accuracy_low']:.1%} to {validation['accuracy_high']:.1%})"
    )
    if validation["accuracy"] < params.model.min_accuracy:
        raise ModelError(
            f"the trained model is right on {validation['accuracy']:.1%} of {validation['n']} held-out questions, "
            f"model.min_accuracy asks for {params.model.min_accuracy:.1%}; give model.curriculum more steps, or try "
            "another seed"
        )
    with replace_directory(root / BASE) as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        metrics = {**describe(directory), "steps": steps, "seconds": round(seconds, 1), "validation": validation}
    return metrics


def _pretrain_with_progress(model, processor, params: Params, checkpoints: Checkpoints, run: Run) -> tuple[int, float]:
    """Steps and seconds that the training took, of the runs it goes on from too."""
    total = sum(phase.steps for phase in params.model.curriculum)
    found = checkpoints.latest()
    done = found[0] if found else 0
    if done:
        print(f"base: going on after step {done:,}")

    with Progress("base", total) as progress:

        def on_step(step: Step) -> None:
            nonlocal done
            done = step.number
            progress.grow(step.total)
            progress.advance(step.number, loss=step.loss, accuracy=step.accuracy)
            if step.number % LOG_EVERY == 0 or step.number == step.total:
                run.metrics({"base/loss": step.loss, "base/answer_accuracy": step.accuracy}, step=step.number)

        seconds = pretrain(model, processor, params.model, params.seed, checkpoints, on_step)
    return done, seconds


def _accuracy(scores: Sequence[float]) -> dict:
    accuracy = sum(scores) / len(scores)
    low, high = wilson_interval(accuracy, len(scores))
    return {"n": len(scores), "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
