"""What a source hands over: candidates, each a row or the reason why there is none."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sparsity_forcing.data.schema import Row

DEFAULT_TASK = "user"  # the task of user rows that name none


class Reason(StrEnum):
    """Why a row is in quarantine; the report and the metrics count by these."""

    MALFORMED_JSON = "malformed_json"
    UNSUPPORTED_CONVERSATION = "unsupported_conversation"
    UNSUPPORTED_ROLE = "unsupported_role"
    UNSUPPORTED_CONTENT = "unsupported_content"
    IMAGE_COUNT = "image_count"
    MISSING_IMAGE = "missing_image"
    PATH_OUTSIDE = "path_outside"
    UNREADABLE_IMAGE = "unreadable_image"
    UNREADABLE_VIDEO = "unreadable_video"
    EMPTY_QUESTION = "empty_question"
    EMPTY_ANSWER = "empty_answer"
    QUESTION_TOO_LONG = "question_too_long"
    UNENCODABLE_TEXT = "unencodable_text"
    RESERVED_TOKEN = "reserved_token"
    BAD_ID = "bad_id"
    DUPLICATE_ID = "duplicate_id"
    UNKNOWN_TASK = "unknown_task"
    UNKNOWN_SPLIT = "unknown_split"
    BAD_NUMBER = "bad_number"


class BadRow(ValueError):  # noqa: N818 - a finding about the data, not a fault of the program
    """A row cannot be used, for ``reason``; ``detail`` says what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Candidate:
    """One row of a source. ``line`` counts from 1; ``raw`` is the row as it stood there, without image bytes."""

    file: str
    line: int
    raw: str
    row: Row | BadRow


@dataclass(frozen=True)
class SplitRule:
    """Gives a row its split by a seeded hash of its images, or of its id where it has none.

    So a split depends neither on the order nor on the other rows, and all questions about the same images are in one.
    Rows that share only some of their images may part: name the split in those.
    """

    seed: int
    validation_share: float
    test_share: float

    def __call__(self, row_id: str, images: Sequence[bytes] = ()) -> str:
        digest = hashlib.sha256(f"{self.seed}:".encode())
        for part in [hashlib.sha256(image).digest() for image in images] or [row_id.encode()]:
            digest.update(part)
        position = int.from_bytes(digest.digest()[:8], "big") / 2**64
        if position < self.test_share:
            return "test"
        return "validation" if position < self.test_share + self.validation_share else "train"


def parse_json_object(text: str) -> dict[str, Any]:
    """A JSON object by the letter of the standard: NaN, infinities and numbers beyond a double are refused.

    Raises:
        BadRow: malformed_json, or unencodable_text where a key or a text, however deep, holds half a character.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BadRow(Reason.MALFORMED_JSON, str(error)) from None
    if not isinstance(value, dict):
        raise BadRow(Reason.MALFORMED_JSON, f"a row is a JSON object, this is a {type(value).__name__}")
    for key, part in value.items():
        try:
            json.dumps({key: part}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(Reason.UNENCODABLE_TEXT, f"{key!r} holds half a character: {error}") from None
        except RecursionError as error:
            raise BadRow(Reason.MALFORMED_JSON, str(error)) from None
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large for a number")
    return number
