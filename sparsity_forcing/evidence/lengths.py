"""Does the token ratio fall as the prompt grows? Base and policy on canvases of ever more cells."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.checkpoints import fingerprint
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.evidence.experiment import DENSE, made_by_policy, measured_once, sampler_at
from sparsity_forcing.inputs import BASE, POLICY, require_inputs
from sparsity_forcing.lineage import code_digest
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params, ParamsError
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.validation import VALIDATED, answered
from sparsity_forcing.scoring import score_function

GRIDS = (8, 12, 16, 24, 32, 48, 64)  # cells a side; a cell is a visual token: 64 to 4,096
ROWS = 24
BATCH = 4  # 4,096 tokens a row
CHECKPOINTS = {"base": BASE, "policy": POLICY}


def measure(params: Params, root: Path) -> dict:
    """Accuracy and token ratios by checkpoint and grid, sparse and dense: metrics/evidence/lengths.json.

    Beyond `data.digits.grids`, which the models were trained on, an accuracy says how far they generalise.

    Raises:
        InputError: the pipeline has not made base and policy yet.
        ParamsError: the data is not of the source whose canvases have any size.
    """
    require_inputs(root, {BASE: "base", POLICY: "train"})
    if reason := why_not(params):
        raise ParamsError(reason)
    return measured_once("lengths", partial(made_by_lengths, params, root), root, partial(_answered, params, root))


def _answered(params: Params, root: Path) -> dict:
    train = params.train.model_copy(update={"validation_batch_size": BATCH})
    own = params.model_copy(update={"train": train})
    score = score_function(params.train.reward.correct)
    found: list[dict] = []
    with Progress("lengths", len(CHECKPOINTS) * len(GRIDS)) as progress:
        for checkpoint, directory in CHECKPOINTS.items():
            model, processor = load(root / directory, params.model.dtype, params.model.device)
            for grid in GRIDS:
                digits = params.data.digits.model_copy(update={"grids": (grid,)})
                rows = [digits_row(digits, params.seed, "test", place) for place in range(ROWS)]
                for p in (params.sparsity.p, DENSE):
                    with decoder_attention(model):
                        means = answered(sampler_at(model, processor, own, p), rows, score).mean(0).tolist()
                    at = {"checkpoint": checkpoint, "visual_tokens": grid**2, "p": p, "questions": ROWS}
                    found.append(at | dict(zip(VALIDATED, means, strict=True)))
                progress.advance(len(found) // 2)
    return {"lengths": found}


def why_not(params: Params) -> str | None:
    """Why these parameters allow no growing prompts; None if they do."""
    if params.data.source != "digits":
        return f"prompts of growing length need data.source digits, got {params.data.source!r}"
    return None


def made_by_lengths(params: Params, root: Path) -> str:
    """Names all that decides the result."""
    return fingerprint([made_by_policy(params, root), code_digest(["evidence/lengths.py"])])
