"""Where the user's own files lie: best in three folders of the workspace, which DVC watches.

What lies elsewhere is read too, but changes without any stage noticing, so the user is told. A model inside an output
is refused: the stage that should read it would replace it.
"""

from __future__ import annotations

from pathlib import Path

from sparsity_forcing.params import Params, ParamsError

DATA, MODELS, CODE = "user_data", "user_models", "user_code"
OUTPUTS = ("data", "models", "checkpoints", "evaluation", "metrics", "plots", "reports")


def require_places(params: Params, root: Path, stage: str | None = None) -> list[str]:
    """What to tell the user about rows, a model or a score function that DVC does not see; what ``stage`` reads of them
    where one is named.

    Raises:
        ParamsError: ``model.name`` is inside an output of the pipeline.
    """
    root = root.resolve()
    unseen = []
    if params.data.source != "digits" and not _is_inside(root / params.data.user.path, root / DATA):
        unseen.append(("data.user.path", str(params.data.user.path), DATA, "prepare"))
    if params.model.name != "scratch" and _is_unseen_model(params.model.name, root):
        unseen.append(("model.name", params.model.name, MODELS, "base"))
    module, has_module, _ = params.train.reward.correct.partition(":")
    if has_module and module.partition(".")[0] != CODE:
        unseen.append(("train.reward.correct", params.train.reward.correct, CODE, "profile train evaluate"))
    return [
        f"{name} {value!r} is outside {folder}/: DVC does not see it change; after a change run "
        f"`dvc repro --force {stages}`, or move it there"
        for name, value, folder, stages in unseen
        if stage is None or stage in stages.split()
    ]


def _is_unseen_model(name: str, root: Path) -> bool:
    path = root / Path(name).expanduser()
    for output in OUTPUTS:
        if _is_inside(path, root / output):
            raise ParamsError(
                f"model.name {name!r} is inside {output}/, which the pipeline writes; move the model to {MODELS}/"
            )
    return path.is_dir() and not _is_inside(path, root / MODELS)


def _is_inside(path: Path, folder: Path) -> bool:
    """Links are followed: what a link leads to is what DVC does not see."""
    return path.resolve().is_relative_to(folder)
