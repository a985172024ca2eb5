"""What stages hand to each other, and what one needs before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TRAIN, VALIDATION, TEST = (Path(f"data/prepared/{split}.parquet") for split in ("train", "validation", "test"))
BASE, POLICY = Path("models/base"), Path("models/policy")
MODELS = {"base": BASE, "policy": POLICY}


class InputError(ValueError):
    """An input of a stage is missing; the message names it and the stage that makes it."""


def require_inputs(root: Path, made_by: Mapping[Path, str]) -> None:
    """Raises InputError unless every path exists below ``root``; ``made_by`` maps it to the stage that makes it."""
    missing = {path: stage for path, stage in made_by.items() if not (root / path).exists()}
    if missing:
        listed = ", ".join(f"{path} (made by stage {stage})" for path, stage in missing.items())
        first = next(iter(missing.values()))
        raise InputError(f"missing in {root.resolve()}: {listed}; run `python -m sparsity_forcing {first}` first")
