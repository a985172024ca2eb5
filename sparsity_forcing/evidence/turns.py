"""A second question on the same image: over the cache that the first one left, and over the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsity_forcing.attention.api import decoder_attention
from sparsity_forcing.attention.context import SparseContext
from sparsity_forcing.data.digits import COLOURS, questions_about
from sparsity_forcing.data.schema import Row
from sparsity_forcing.evidence.experiment import DENSE, MadeBy, held_out, made_by_policy, measured_once, sampler_at
from sparsity_forcing.inputs import BASE, MODELS, POLICY, require_inputs
from sparsity_forcing.models.load import load
from sparsity_forcing.params import Params, ParamsError
from sparsity_forcing.progress import Progress
from sparsity_forcing.rl.rollout import Rollouts
from sparsity_forcing.rl.sampler import Sampler
from sparsity_forcing.scoring import ScoreFunction, score_function

BATCH = 50
QUESTIONS = 1000


class LeftoverContext(SparseContext):
    """A prompt over the cache that an earlier one about the same images left: nothing is selected, and the visual
    prefix has what that one kept.

    Args:
        left: per layer (batch, slots) bool, the kept sets of the earlier prompt, its visual prefix first.
    """

    def __init__(self, *args: object, left: dict[int, Tensor], **options: object) -> None:
        super().__init__(*args, **options)
        self.left, self.slots = left, int(self.layout.prefix.any(0).sum())

    def choose(self, layer: int, query: Tensor, key: Tensor, first: int, scale: float) -> Tensor:
        prefix = self.left[layer][:, : self.slots]
        self.kept[layer] = torch.cat([prefix, self.layout.valid[:, self.slots :]], dim=1)
        return self.kept[layer]


def measure(params: Params, root: Path) -> dict:
    """Accuracy of a second question on held-out images by checkpoint and by what it is answered over:
    metrics/evidence/turns.json.

    ``dense``: all tokens. ``dense_cache``: the dense visual prefix was kept beside the pruned cache, and the second
    question selects from it for itself. ``pruned_cache``: what the first question kept is all there is. The second
    question is asked afresh, without the first and its answer before it, as the models know single questions only.

    Raises:
        InputError: the pipeline has not made base and policy yet.
        ParamsError: the data has no second question, or the cache no visual prefix of its own.
    """
    require_inputs(root, {BASE: "base", POLICY: "train"})
    if reason := why_not(params):
        raise ParamsError(reason)
    return measured_once("turns", made_by, params, root, partial(_answered, params, root))


def _answered(params: Params, root: Path) -> dict:
    asked = ((row, second_question(row, params.seed)) for row in held_out(params, root))
    pairs = list(islice(((first, second) for first, second in asked if second is not None), QUESTIONS))
    score = score_function(params.train.reward.correct)
    found = {}
    with Progress("turns", len(MODELS)) as progress:
        for checkpoint, directory in MODELS.items():
            model, processor = load(root / directory, params.model.dtype, params.model.device)
            samplers = [sampler_at(model, processor, params, p) for p in (params.sparsity.p, DENSE)]
            with decoder_attention(model):
                found[checkpoint] = answered_twice(*samplers, pairs, score)
            progress.advance(len(found))
    return {"p": params.sparsity.p, "questions": len(pairs), "checkpoints": found}


def why_not(params: Params) -> str | None:
    """Why these parameters allow no second question; None if they do."""
    if params.data.source != "digits":
        return f"a second question about an image needs data.source digits, got {params.data.source!r}"
    if (params.sparsity.prefill, params.sparsity.scoring_rows) != ("suffix", "text"):
        return (
            "a second question over the first one's cache needs a visual prefix that depends on no question, and "
            "answers that see kept tokens only: sparsity.prefill suffix with scoring_rows text, got "
            f"{params.sparsity.prefill!r} and {params.sparsity.scoring_rows!r}"
        )
    return None


def second_question(row: Row, seed: int) -> Row | None:
    """The row with a question about other colours of its canvas, drawn by ``seed`` and the row's id; None if there is
    none."""
    every = questions_about(row.meta["colours"], row.meta["labels"])
    others = [asked for asked in every if colours_in(asked[1]).isdisjoint(colours_in(row.question))]
    if not others:
        return None
    task, question, answer = others[np.random.default_rng([seed, *row.id.encode()]).integers(len(others))]
    return replace(row, task=task, question=question, answer=answer)


def colours_in(question: str) -> set[str]:
    """The colours that a question names."""
    return {colour for colour in COLOURS if colour in question}


def answered_twice(
    sparse: Sampler, dense: Sampler, pairs: Sequence[tuple[Row, Row]], score: ScoreFunction
) -> dict[str, dict]:
    """Of the second questions by what they are answered over: ``accuracy``, ``visual_token_ratio`` and ``scores``, a
    character per question, "1" where it is right."""
    scores: dict[str, list[float]] = {"dense": [], "dense_cache": [], "pruned_cache": []}
    ratios: dict[str, list[float]] = {way: [] for way in scores}
    for start in range(0, len(pairs), BATCH):
        first, second = (list(rows) for rows in zip(*pairs[start : start + BATCH], strict=True))
        left = sparse.deployed(first).kept
        answers: dict[str, Rollouts] = {
            "dense": dense.deployed(second),
            "dense_cache": sparse.deployed(second),
            "pruned_cache": sparse.deployed(second, partial(LeftoverContext, left=left)),
        }
        for way, found in answers.items():
            texts = sparse.texts(found)
            scores[way] += [score(text, row.answer) for text, row in zip(texts, second, strict=True)]
            ratios[way] += found.visual_token_ratio.tolist()
    return {
        way: {
            "accuracy": float(np.mean(scores[way])),
            "visual_token_ratio": float(np.mean(ratios[way])),
            "scores": "".join("1" if value > 0.5 else "0" for value in scores[way]),
        }
        for way in scores
    }


def made_by(params: Params, root: Path) -> MadeBy:
    """Names all that decides the result."""
    return made_by_policy("turns", params, root)
