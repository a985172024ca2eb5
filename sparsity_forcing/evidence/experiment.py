"""One arm: trained from the pipeline's base, then judged on the held-out questions. Resumable; done arms stay done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.checkpoints import Checkpoints, fingerprint
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import Row, read_rows
from sparsity_forcing.evidence.alternatives import OBJECTIVES
from sparsity_forcing.evidence.arms import ANY_BUDGET, Arm
from sparsity_forcing.files import write_json_atomic
from sparsity_forcing.inputs import BASE, POLICY, TEST, TRAIN, VALIDATION, require_inputs
from sparsity_forcing.lineage import code_digest, dvc_md5, file_digest, git_state, hardware
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params, ParamsError
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.identity import decisive
from sparsity_forcing.rl.sampler import Sampler
from sparsity_forcing.rl.validation import VALIDATED, answered
from sparsity_forcing.scoring import score_function
from sparsity_forcing.tracking import Run, Tracker

RESULTS = Path("metrics/evidence")
CHECKPOINTS = Path("checkpoints/evidence")
DENSE = 1.0
TOKENS = ("prompt_tokens", "new_tokens")  # of all rollouts: a prompt's count for each of its rollouts
QUESTIONS = 5000  # that every policy is judged on
INPUTS = {BASE: "base", TRAIN: "prepare", VALIDATION: "prepare", TEST: "prepare"}


class MadeBy(NamedTuple):
    """What decides a result, as two fingerprints: ``what`` is of parameters, versions, base and data, ``code`` of the
    code."""

    what: str
    code: str


def run_arm(arm: Arm, params: Params, root: Path) -> dict:
    """Writes metrics/evidence/NAME.json, unless a current one is there (see `current`); returns it.

    Raises:
        InputError: the pipeline has not made the base and the data yet.
        ParamsError, TrainingError, ModelError: the parameters or the base do not allow the training.
    """
    require_inputs(root, INPUTS)
    own = arm.params(params)
    made_by = made_by_arm(arm, params, root)
    made_of = decisive(own, root, 1) | {"rows": arm.rows, "objective": arm.objective}
    keep = own.train.keep_checkpoints
    checkpoints = Checkpoints(root / CHECKPOINTS / arm.name, fingerprint(made_by), keep, made_of)
    if (done := current(arm.name, lambda: made_by, root)) is not None:
        checkpoints.clear()
        return done
    origin = head(arm.name, made_by, root)
    model, processor = load(root / BASE, own.model.dtype, own.model.device)
    rows, validation = read_rows(root / TRAIN), read_rows(root / VALIDATION)
    if arm.rows == "hard":
        rows = wrongly_answered(model, processor, rows, own)
    if arm.rows == "undistorted":
        rows = undistorted(len(rows), params)
    inputs = [path for path in INPUTS if not (path == TRAIN and arm.rows == "undistorted")]
    tags = {"arm": arm.name, "question": arm.question} | {f"dvc.{path}.md5": dvc_md5(root / path) for path in inputs}
    with Tracker(own.tracking, root).run("evidence", arm.name, {"arm": arm.name, "seed": own.seed}, tags) as record:
        for split in inputs:
            if split != BASE:
                record.dataset(root / split, name=f"{own.data.source}-{split.stem}", split=split.stem)
        with Progress(arm.name, own.train.steps) as progress:
            report = _report(record, progress)
            trainer = OBJECTIVES[arm.objective](
                model, processor, rows, validation, own.train, own.sparsity, own.seed, checkpoints, report
            )
            history = trainer.train()
        found = {
            **origin,
            "question": arm.question,
            "seed": own.seed,
            "changed": {"train": arm.train, "sparsity": arm.sparsity, "rows": arm.rows},
            "training_rows": len(rows),
            "prompts": len(history) * own.train.prompts_per_step,
            **{name: int(sum(row.get(name, 0) for row in history)) for name in ("rollouts", *TOKENS)},
            "seconds": round(trainer.seconds, 1),
            "policy_step": trainer.best["step"] if trainer.best else len(history),
            "within_guard": trainer.best is not None,
            "replay_max_difference": max(row.get("replay_max_difference", 0.0) for row in history),
            "skipped_steps": int(history[-1]["skipped_steps"]),
            "curve": curve(history),
            "test": judged(model, processor, own, held_out(params, root), ANY_BUDGET if arm.at_any_budget else ()),
        }
        record.metrics({f"eval/{name}": found["test"][str(own.sparsity.p)][name] for name in VALIDATED})
        write_json_atomic(root / RESULTS / f"{arm.name}.json", found)
        record.artifact(root / RESULTS / f"{arm.name}.json")
    checkpoints.clear()
    return found


def run_base(params: Params, root: Path) -> dict:
    """As `run_arm` for the base, which needs no training: metrics/evidence/base.json."""
    require_inputs(root, INPUTS)

    def measure() -> dict:
        model, processor = load(root / BASE, params.model.dtype, params.model.device)
        return {"test": judged(model, processor, params, held_out(params, root), ANY_BUDGET)}

    return measured_once("base", made_by_base, params, root, measure)


def made_by_arm(arm: Arm, params: Params, root: Path) -> MadeBy:
    """Names all that decides an arm's result."""
    base = made_by_base(arm.params(params), root)
    code = base.code if arm.objective == "grpo" else fingerprint([base.code, code_digest(["evidence/alternatives.py"])])
    return MadeBy(fingerprint([base.what, arm.rows, arm.at_any_budget, arm.objective]), code)


def made_by_base(params: Params, root: Path) -> MadeBy:
    """The same for what is not trained."""
    judging = [params.evaluate.budgets, ANY_BUDGET, params.model.device]
    questions = [params.data.source, params.data.digits.model_dump(), file_digest(root / TEST, "sha256")]
    training = decisive(params, root, 1)
    code = [training.pop("code"), code_digest(["evidence/experiment.py", "data/digits.py", "data/digits_source.py"])]
    return MadeBy(fingerprint([training, judging, questions]), fingerprint(code))


def made_by_policy(module: str, params: Params, root: Path) -> MadeBy:
    """The same for what ``module`` of this package measures of the pipeline's policy beside its base."""
    weights = [file_digest(path, "sha256") for path in sorted((root / POLICY).glob("*.safetensors"))]
    base = made_by_base(params, root)
    code = code_digest([f"evidence/{module}.py"])
    return MadeBy(fingerprint([base.what, weights]), fingerprint([base.code, code]))


def current(name: str, made_by: Callable[[], MadeBy], root: Path) -> dict | None:
    """The result of this name, if there is one and nothing that decides it has changed since."""
    found = stored(name, root)
    return found if found is not None and (found["made_by"], found.get("code")) == made_by() else None


def stored(name: str, root: Path) -> dict | None:
    """The result of this name, current or not."""
    path = root / RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def accept_code(name: str, made_by: Callable[[], MadeBy], root: Path) -> bool:
    """Takes a result of other code for one of the present code, if nothing else that decides it has changed; whether
    there was one. Its ``commit`` stays that of the measurement."""
    found = stored(name, root)
    if found is None or found["made_by"] != made_by().what or found.get("code") == made_by().code:
        return False
    write_json_atomic(root / RESULTS / f"{name}.json", found | {"code": made_by().code})
    return True


def measured_once(
    name: str, made_by: Callable[[Params, Path], MadeBy], params: Params, root: Path, measure: Callable[[], dict]
) -> dict:
    """The current result of this name; without one what ``measure`` finds, written to metrics/evidence/NAME.json and
    into a run of MLflow, its numbers by dotted name."""
    if (done := current(name, partial(made_by, params, root), root)) is not None:
        return done
    origin = head(name, made_by(params, root), root)
    with Tracker(params.tracking, root).run("evidence", name, {"seed": params.seed}, {"arm": name}) as record:
        measured = measure()
        write_json_atomic(root / RESULTS / f"{name}.json", origin | measured)
        record.metrics(dict(numbers(measured)))
        record.artifact(root / RESULTS / f"{name}.json")
    return origin | measured


def numbers(values: object, name: str = "eval") -> Iterator[tuple[str, float]]:
    """The numbers in nested values, named ``eval/…`` by the keys and places that lead to them."""
    if isinstance(values, bool | int | float):
        yield name, float(values)
    elif isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from numbers(value, f"{name}/{key}")


def head(name: str, made_by: MadeBy, root: Path) -> dict:
    """What every result says of where it comes from."""
    git, (what, code) = git_state(root), made_by
    return {
        "name": name, "made_by": what, "code": code,
        "commit": git.commit, "dirty": git.dirty, "hardware": hardware(),
    }  # fmt: skip


def held_out(params: Params, root: Path) -> list[Row]:
    """The test split; of the source `digits` as many more of its rows as make `QUESTIONS`."""
    rows = read_rows(root / TEST)
    if params.data.source != "digits":
        return rows
    more = range(len(rows), QUESTIONS)
    return rows + [digits_row(params.data.digits, params.seed, "test", place) for place in more]


def judged(model, processor, params: Params, rows: list[Row], more: Sequence[float] = ()) -> dict[str, dict]:
    """Results on ``rows`` by budget: the deployed one, the evaluated ones, ``more`` and dense attention.

    ``scores`` holds a character per question, "1" where the score is above one half, so that two models are compared
    question by question.
    """
    score = score_function(params.train.reward.correct)
    budgets = sorted({params.sparsity.p, *params.evaluate.budgets, *more, DENSE})
    found = {}
    with decoder_attention(model):
        for p in budgets:
            answers = answered(sampler_at(model, processor, params, p), rows, score)
            means = dict(zip(VALIDATED, answers.mean(0).tolist(), strict=True))
            scores = "".join("1" if value > 0.5 else "0" for value in answers[:, 0])
            found[str(p)] = {**means, "questions": len(rows), "scores": scores}
    return found


def wrongly_answered(model, processor, rows: list[Row], params: Params) -> list[Row]:
    """The rows whose greedy answer with dense attention is wrong."""
    score = score_function(params.train.reward.correct)
    with decoder_attention(model):
        answers = answered(sampler_at(model, processor, params, DENSE), rows, score)
    return [row for row, right in zip(rows, answers[:, 0] > 0.5, strict=True) if not right]


def undistorted(count: int, params: Params) -> list[Row]:
    """The first ``count`` training rows of the source `digits`, their scans as they are.

    Raises:
        ParamsError: with these parameters no training row shows distorted scans.
    """
    if why := why_not_undistorted(params):
        raise ParamsError(why)
    plain = params.data.digits.model_copy(update={"distorted": False})
    return [digits_row(plain, params.seed, "train", place) for place in range(count)]


def why_not_undistorted(params: Params) -> str | None:
    """Why there are no such rows with these parameters; None where there are."""
    if params.data.source != "digits":
        return f"data.source is {params.data.source}: only the rows of digits show distorted scans"
    return (
        None if params.data.digits.distorted else "data.digits.distorted is false: the rows show the scans as they are"
    )


def curve(history: list[dict]) -> list[dict]:
    """Accuracy and ratios of the validations, the start as step 0."""
    start = {"step": 0, **{name: history[0][f"start_{name}"] for name in VALIDATED}}
    later = [
        {"step": row["step"], **{name: row[f"validation_{name}"] for name in VALIDATED}}
        for row in history
        if "validation_accuracy" in row
    ]
    return [start, *later]


def sampler_at(model, processor, params: Params, p: float) -> Sampler:
    return Sampler(model, processor, params.train, params.sparsity.model_copy(update={"p": p}))


def _report(record: Run, progress: Progress):
    def report(metrics: dict, table: list[dict] | None) -> None:
        record.training_step(metrics)
        shown = {name: metrics[name] for name in ("accuracy", "visual_token_ratio") if name in metrics}
        progress.advance(int(metrics["step"]), **shown)

    return report
