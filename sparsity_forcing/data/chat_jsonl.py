"""The `chat_jsonl` source: the user's rows in TRL's conversational form, one JSON object a line.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "…?"}]},
                  {"role": "assistant", "content": "…"}]}
    {"prompt": "…?", "completion": "…", "images": ["a.png"]}

``prompt`` and ``completion`` may be messages too. Paths are relative to the file and do not leave its folder: DVC would
not see a file elsewhere change. Optional keys: ``id``, ``split``, ``task``, ``images``, ``frames_per_second`` (the
images are then the frames of a video); all other keys go to ``meta``. A model is shown frames as separate images in
their order; how many make a second is kept with the row, but told to no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_forcing.data.candidates import DEFAULT_TASK, BadRow, Candidate, Reason, SplitRule, parse_json_object
from sparsity_forcing.data.images import read_image, read_video
from sparsity_forcing.data.schema import Row

OWN_KEYS = {"messages", "prompt", "completion", "images", "id", "split", "task", "frames_per_second"}


@dataclass(frozen=True)
class Question:
    """What a conversation says. ``media``: ("image" | "video", path or None for the next of the row's ``images``)."""

    text: str
    answer: str
    media: list[tuple[str, str | None]]


def chat_jsonl_candidates(path: Path, split_rule: SplitRule, max_video_frames: int) -> Iterator[Candidate]:
    """The lines of a JSONL file that are not blank.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; data.user.path names the JSONL file with your rows")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if not line:
                continue
            try:
                row = parse_line(line, path.parent, split_rule, max_video_frames)
            except BadRow as reason:
                row = reason
            yield Candidate(str(path), number, line.decode("utf-8", errors="backslashreplace"), row)


def parse_line(line: bytes, folder: Path, split_rule: SplitRule, max_video_frames: int) -> Row:
    """One line as a row, images and video frames read from ``folder``.

    Raises:
        BadRow: with the first reason that applies.
    """
    try:
        values = parse_json_object(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(Reason.MALFORMED_JSON, f"not UTF-8: {error}") from None
    question = _question(_messages(values))
    images, rate = _read_media(_media(question, values.get("images")), folder, max_video_frames)
    row_id = _row_id(values.get("id"), line)
    return Row(
        id=row_id,
        split=_string(values, "split", Reason.UNKNOWN_SPLIT) or split_rule(row_id, images),
        task=_string(values, "task", Reason.UNKNOWN_TASK) or DEFAULT_TASK,
        question=question.text.strip(),
        answer=question.answer.strip(),
        images=images,
        frames_per_second=rate if rate is not None else _rate(values.get("frames_per_second")),
        meta={key: value for key, value in values.items() if key not in OWN_KEYS},
    )


def _messages(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's conversation, whichever of the two forms it has."""
    if "messages" in values:
        messages = values["messages"]
    elif "prompt" in values and "completion" in values:
        messages = _turn(values, "prompt", "user") + _turn(values, "completion", "assistant")
    else:
        raise BadRow(Reason.UNSUPPORTED_CONVERSATION, "needs 'messages', or 'prompt' and 'completion'")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow(Reason.UNSUPPORTED_CONVERSATION, "messages must be a list of objects with role and content")
    roles = [message.get("role") for message in messages]
    for role in roles:
        if role not in ("user", "assistant"):
            raise BadRow(Reason.UNSUPPORTED_ROLE, f"role {role!r}; a row is one user and one assistant message")
    if roles != ["user", "assistant"]:
        raise BadRow(Reason.UNSUPPORTED_CONVERSATION, f"roles are {roles}; a row is one question and its answer")
    return messages


def _turn(values: dict[str, Any], key: str, role: str) -> list[dict[str, Any]]:
    value = values[key]
    if value is not None and not isinstance(value, str | list):
        raise BadRow(
            Reason.UNSUPPORTED_CONTENT, f"{key} must be text or a list of messages, got {type(value).__name__}"
        )
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _question(messages: list[dict[str, Any]]) -> Question:
    text, media = _content(messages[0].get("content"))
    answer, shown = _content(messages[1].get("content"))
    if shown:
        raise BadRow(Reason.UNSUPPORTED_CONTENT, "the assistant's message holds an image or a video; only text is used")
    return Question(text, answer, media)


def _content(content: Any) -> tuple[str, list[tuple[str, str | None]]]:
    """The text of a message, its parts one a line, and its media in order."""
    if isinstance(content, str):
        return content, []
    if content is None:
        return "", []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRow(Reason.UNSUPPORTED_CONTENT, "content must be text or a list of parts")
    texts, media = [], []
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "video"):
            source = part.get(kind, part.get("path"))
            if source is not None and not isinstance(source, str):
                raise BadRow(Reason.UNSUPPORTED_CONTENT, f"{kind} must be a path, got {type(source).__name__}")
            media.append((kind, source))
        else:
            raise BadRow(Reason.UNSUPPORTED_CONTENT, f"a part of type {kind!r}; text, image and video are used")
    return "\n".join(texts), media


def _media(question: Question, listed: Any) -> list[tuple[str, str]]:
    """Every medium with its path: parts without one take the row's ``images`` in turn."""
    if listed is None:
        listed = []
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise BadRow(Reason.UNSUPPORTED_CONTENT, "images must be a list of paths")
    if not question.media:
        return [("image", path) for path in listed]
    unnamed = sum(path is None for _, path in question.media)
    if unnamed != len(listed):
        raise BadRow(
            Reason.IMAGE_COUNT, f"{unnamed} image part(s) without a path, but {len(listed)} path(s) in 'images'"
        )
    paths = iter(listed)
    return [(kind, path if path is not None else next(paths)) for kind, path in question.media]


def _read_media(media: list[tuple[str, str]], folder: Path, max_video_frames: int) -> tuple[list[bytes], float | None]:
    """The images, or the frames of the one video and their rate."""
    kinds = [kind for kind, _ in media]
    if "video" not in kinds:
        return [read_image(_inside(folder, path)) for _, path in media], None
    if len(kinds) > 1:
        raise BadRow(Reason.UNSUPPORTED_CONTENT, "a row has images or one video, not both and not several")
    return read_video(_inside(folder, media[0][1]), max_video_frames)


def _inside(folder: Path, name: str) -> Path:
    """The path of a file the row names; it stays in ``folder``, links followed."""
    if "://" in name:
        raise BadRow(Reason.MISSING_IMAGE, f"{name!r} is an address; nothing is downloaded, give a path")
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError) as error:
        raise BadRow(Reason.MISSING_IMAGE, f"{name!r}: {error}") from None
    if not path.is_relative_to(folder.resolve()):
        raise BadRow(Reason.PATH_OUTSIDE, f"{name!r} leads out of the file's folder, where DVC would not see it change")
    return path


def _row_id(value: Any, line: bytes) -> str:
    """The row's id; without one a digest of the line, so that an identical line is a duplicate."""
    if value is None:
        return hashlib.sha256(line).hexdigest()[:16]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(Reason.BAD_ID, f"id {value!r} is neither text nor a whole number")
    return str(value)


def _string(values: dict[str, Any], key: str, reason: Reason) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(reason, f"{key} {value!r} is not text")
    return value


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(Reason.BAD_NUMBER, f"frames_per_second {value!r} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise BadRow(Reason.BAD_NUMBER, f"frames_per_second: {error}") from None
