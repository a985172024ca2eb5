"""How token ratio and accuracy depend on the budget, the layer, the prompt length and the scoring rows.

Direct generation, not lmms-eval: the same scoring on many settings of one model. Four tables come out, one row per
question and setting: `by_budget`, `by_layer`, `by_length`, `by_scoring_rows`. The first two and the last are measured
on the middle length, `by_length` on all; only `by_scoring_rows` leaves the scoring rows that are deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import Row
from sparsity_forcing.evaluation.answers import Answer, answer_batch
from sparsity_forcing.evaluation.intervals import wilson_interval
from sparsity_forcing.methods import sparse_method
from sparsity_forcing.models.prompts import encode_messages, question_messages
from sparsity_forcing.params import DigitsParams, ProfileParams, SparsityParams
from sparsity_forcing.scoring import ScoreFunction

TERCILES = ("short", "medium", "long")


class ProfileError(ValueError):
    """The data does not allow a profile."""


@dataclass(frozen=True)
class Lengths:
    """Questions by prompt length, short to long; every table but `by_length` uses the ``middle`` group."""

    groups: dict[str, list[Row]]

    @property
    def middle(self) -> str:
        return list(self.groups)[len(self.groups) // 2]


@dataclass(frozen=True)
class Setting:
    """One point of the profile: a length group, scoring rows and a budget."""

    length: str
    scoring_rows: str
    p: float


def digits_lengths(params: DigitsParams, grids: Sequence[int], rows: int, seed: int) -> Lengths:
    """``rows`` new questions per grid, rendered from validation scans; the tasks take turns."""
    groups = {}
    for grid in sorted(grids):
        one_grid = params.model_copy(update={"grids": (grid,)})
        groups[f"{grid}x{grid}"] = [digits_row(one_grid, seed, "validation", place) for place in range(rows)]
    return Lengths(groups)


def tercile_lengths(validation: Sequence[Row], processor, rows: int, seed: int) -> Lengths:
    """Up to ``rows`` questions from each third of a sample of ``validation``, ordered by prompt length in tokens.

    Raises:
        ProfileError: there are not three rows.
    """
    if len(validation) < len(TERCILES):
        raise ProfileError(
            f"the profile by prompt length needs at least {len(TERCILES)} validation rows, got {len(validation)}; add "
            "rows, or raise data.user.validation_share"
        )
    rng = np.random.default_rng(seed)
    sample = rng.permutation(len(validation))[: len(TERCILES) * rows]
    by_length = sorted(sample, key=lambda index: (_prompt_length(processor, validation[index]), index))
    parts = np.array_split(np.asarray(by_length), len(TERCILES))
    return Lengths({name: [validation[index] for index in part] for name, part in zip(TERCILES, parts, strict=True)})


def settings_to_profile(lengths: Lengths, params: ProfileParams, deployed: str) -> list[Setting]:
    """Length by budget at the deployed scoring rows, and scoring rows by budget at the middle length."""
    points = [Setting(length, deployed, p) for length in lengths.groups for p in params.budgets]
    others = [rows for rows in params.scoring_rows if rows != deployed]
    return points + [Setting(lengths.middle, rows, p) for rows in others for p in params.budgets]


def profile_model(
    model,
    processor,
    lengths: Lengths,
    points: Sequence[Setting],
    sparsity: SparsityParams,
    score: ScoreFunction,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None],
) -> list[dict]:
    """One record per point and question: the setting, the question, its score, its ratios in all and by layer."""
    records = []
    for point in points:
        method = sparse_method(sparsity.model_copy(update={"scoring_rows": point.scoring_rows}), point.p)
        rows = lengths.groups[point.length]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            answers = answer_batch(
                model,
                processor,
                [question_messages(row.question, row.images) for row in batch],
                method,
                {"max_new_tokens": max_new_tokens, "do_sample": False},
            )
            records += [_record(point, row, answer, score) for row, answer in zip(batch, answers, strict=True)]
            on_progress(len(batch))
    return records


def profile_tables(records: Sequence[Mapping], middle: str, deployed: str) -> dict[str, pd.DataFrame]:
    """The four tables of records of `profile_model`."""
    frame = pd.DataFrame(records)
    layers = ["layer_ratio", "layer_visual_ratio"]
    flat = frame.drop(columns=layers)
    is_middle, is_deployed = frame["length"] == middle, frame["scoring_rows"] == deployed
    return {
        "by_budget": flat[is_middle & is_deployed],
        "by_layer": pd.DataFrame(_layers(record for record in records if _at(record, middle, deployed))),
        "by_length": flat[is_deployed],
        "by_scoring_rows": flat[is_middle],
    }


def summarize(table: pd.DataFrame, by: Sequence[str]) -> list[dict]:
    """Means over questions per combination of ``by``; with the accuracy and its 95% interval where there are scores."""
    rows = []
    for keys, group in table.groupby(list(by), sort=False):
        row = dict(zip(by, keys, strict=True)) | {"n": len(group)}
        for name in ("prompt_tokens", "visual_tokens", "token_ratio", "visual_token_ratio"):
            if name in group:
                mean = group[name].astype("float64").mean()
                row[name] = None if np.isnan(mean) else float(mean)
        if "score" in group:
            accuracy = float(group["score"].mean())
            low, high = wilson_interval(accuracy, len(group))
            row |= {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
        rows.append(row)
    return rows


def _record(point: Setting, row: Row, answer: Answer, score: ScoreFunction) -> dict:
    return {
        "length": point.length,
        "scoring_rows": point.scoring_rows,
        "p": point.p,
        "task": row.task,
        "id": row.id,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "score": score(answer.text, row.answer),
        "token_ratio": answer.token_ratio,
        "visual_token_ratio": answer.visual_token_ratio,
        "layer_ratio": answer.layer_ratio,
        "layer_visual_ratio": answer.layer_visual_ratio,
    }


def _layers(records: Iterator[Mapping]) -> Iterator[dict]:
    for record in records:
        visual = record["layer_visual_ratio"] or [None] * len(record["layer_ratio"])
        for layer, ratios in enumerate(zip(record["layer_ratio"], visual, strict=True)):
            shared = {key: record[key] for key in ("p", "task", "id")}
            yield {**shared, "layer": layer, "token_ratio": ratios[0], "visual_token_ratio": ratios[1]}


def _at(record: Mapping, length: str, scoring_rows: str) -> bool:
    return record["length"] == length and record["scoring_rows"] == scoring_rows


def _prompt_length(processor, row: Row) -> int:
    return encode_messages(processor, [question_messages(row.question, row.images)])["input_ids"].shape[1]
