"""What every row must satisfy, whatever source it is from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparsity_forcing.data.candidates import BadRow, Reason
from sparsity_forcing.data.images import decode
from sparsity_forcing.data.schema import SPLITS, Row

# Processors put an image's tokens in place of these; in a question they would be taken for an image that is not there.
RESERVED_TOKEN = re.compile(r"<\|(?:image|video)_pad\|>|<\|vision_(?:start|end)\|>|<image>|<video>|<IMG_CONTEXT>")
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # a task name becomes a metric key and a file name


@dataclass(frozen=True)
class Limits:
    """``tasks``: the task names that are allowed; empty allows any."""

    max_question_characters: int
    tasks: tuple[str, ...] = ()


def check_row(row: Row, limits: Limits) -> list[tuple[int, int]]:
    """Checks all of ``row`` and returns the (width, height) of its images.

    Raises:
        BadRow: with the first reason that applies.
    """
    _check_text(row, limits)
    if row.split not in SPLITS:
        raise BadRow(Reason.UNKNOWN_SPLIT, f"split {row.split!r}; one of {', '.join(SPLITS)}")
    if not TASK_NAME.fullmatch(row.task):
        raise BadRow(Reason.UNKNOWN_TASK, f"task {row.task!r}: use letters, digits, '_', '.', '-', at most 64 of them")
    if limits.tasks and row.task not in limits.tasks:
        raise BadRow(Reason.UNKNOWN_TASK, f"task {row.task!r}; one of {', '.join(limits.tasks)}")
    rate = row.frames_per_second
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise BadRow(Reason.BAD_NUMBER, f"frames_per_second is {rate}, must be a finite number above 0")
    sizes = []
    for place, image in enumerate(row.images, start=1):
        try:
            sizes.append(decode(image).size)
        except BadRow as error:
            raise BadRow(error.reason, f"image {place} of {len(row.images)}: {error.detail}") from None
    return sizes


def _check_text(row: Row, limits: Limits) -> None:
    for name in ("id", "split", "task", "question", "answer"):
        try:
            getattr(row, name).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(Reason.UNENCODABLE_TEXT, f"{name} holds half a character: {error}") from None
    if not row.id.strip():
        raise BadRow(Reason.BAD_ID, "the id is empty")
    if not row.question.strip():
        raise BadRow(Reason.EMPTY_QUESTION, "the question is empty")
    if not row.answer.strip():
        raise BadRow(Reason.EMPTY_ANSWER, "the answer is empty: no prediction could ever be right")
    if len(row.question) > limits.max_question_characters:
        raise BadRow(
            Reason.QUESTION_TOO_LONG,
            f"the question has {len(row.question)} characters, at most {limits.max_question_characters} are allowed",
        )
    if found := RESERVED_TOKEN.search(row.question):
        raise BadRow(
            Reason.RESERVED_TOKEN, f"the question holds {found[0]!r}; images are placed before it by themselves"
        )
