"""Does the token ratio fall as the prompt grows? Base and policy on canvases of ever more cells."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.evidence.experiment import DENSE, MadeBy, made_by_policy, measured_once, sampler_at
from sparsity_forcing.inputs import BASE, MODELS, POLICY, require_inputs
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params, ParamsError
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.validation import VALIDATED, answered
from sparsity_forcing.scoring import score_function

GRIDS = (8, 12, 16, 24, 32, 48, 64)  # cells a side; a cell is a visual token: 64 to 4,096
TOKENS = 24 * GRIDS[-1] ** 2  # visual tokens a length: many questions where they are short
MOST = 480  # questions a length
BATCH = 4 * GRIDS[-1] ** 2  # visual tokens


def measure(params: Params, root: Path) -> dict:
    """Accuracy and token ratios by checkpoint and grid, sparse and dense: metrics/evidence/lengths.json.

    Beyond `data.digits.grids`, which the models were trained on, an accuracy says how far they generalise.

    Raises:
        InputError: the pipeline has not made base and policy yet.
        ParamsError: the data is not of the source whose canvases have any size, or nothing is sparse.
    """
    require_inputs(root, {BASE: "base", POLICY: "train"})
    if reason := why_not(params):
        raise ParamsError(reason)
    return measured_once("lengths", made_by, params, root, partial(_answered, params, root))


def _answered(params: Params, root: Path) -> dict:
    score = score_function(params.train.reward.correct)
    found: list[dict] = []
    with Progress("lengths", len(MODELS) * len(GRIDS)) as progress:
        for checkpoint, directory in MODELS.items():
            model, processor = load(root / directory, params.model.dtype, params.model.device)
            for grid in GRIDS:
                digits = params.data.digits.model_copy(update={"grids": (grid,)})
                rows = [digits_row(digits, params.seed, "test", place) for place in range(questions(grid))]
                train = params.train.model_copy(update={"validation_batch_size": max(1, BATCH // grid**2)})
                own = params.model_copy(update={"train": train})
                for p in (params.sparsity.p, DENSE):
                    with decoder_attention(model):
                        means = answered(sampler_at(model, processor, own, p), rows, score).mean(0).tolist()
                    at = {"checkpoint": checkpoint, "visual_tokens": grid**2, "p": p, "questions": len(rows)}
                    found.append(at | dict(zip(VALIDATED, means, strict=True)))
                progress.advance(len(found) // 2)
    return {"p": params.sparsity.p, "lengths": found}


def questions(grid: int) -> int:
    """How many are asked about canvases of ``grid`` x ``grid`` cells."""
    return max(1, min(MOST, TOKENS // grid**2))


def why_not(params: Params) -> str | None:
    """Why these parameters allow no growing prompts; None if they do."""
    if params.data.source != "digits":
        return f"prompts of growing length need data.source digits, got {params.data.source!r}"
    if params.sparsity.p == DENSE:
        return "sparse is compared with dense: sparsity.p has to be below 1, got 1"
    return None


def made_by(params: Params, root: Path) -> MadeBy:
    """Names all that decides the result."""
    return made_by_policy("lengths", params, root)
