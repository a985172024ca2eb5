"""Outputs that are whole or absent: everything is written under a temporary name beside its place, then renamed.

A process killed at any moment leaves the old output or the new one, never half of one. The temporary names start with
a dot and hold ``.tmp`` (git and DVC ignore them); what a killed run left is removed by the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How safetensors and torch say that a write failed; neither raises OSError then.
_FAILED_WRITE = re.compile(r"\(os error \d+\)|inline_container\.cc|file write failed|iostream error")


class WriteError(OSError):
    """An output could not be written; the message says what the library said, a note names the output."""


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8; parents are created."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | Path, value: object) -> None:
    """Writes `json_text` of ``value``, and raises as it does."""
    write_text_atomic(path, json_text(value, path))


def json_text(value: object, path: str | Path) -> str:
    """JSON as people and git like it: two spaces, sorted keys, a newline at the end; ``path`` is where it will go.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path} cannot be written as JSON: {error}") from None


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path with the same suffix; on success what was written there becomes ``path``.

    On any error the temporary file is removed and the old ``path`` stays as it was. One writer per path at a time.

    Raises:
        OSError: it could not be written (a full disk), whatever the library that wrote raises for that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.new.tmp{path.suffix}")  # a killed run's is taken over by the next
    temporary.unlink(missing_ok=True)
    try:
        with _named_when_it_fails(path):
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_directory(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside ``path``; on success it becomes ``path``, with all that is in it.

    On any error it is removed and the old ``path`` stays as it was. One writer per path at a time.

    Raises:
        OSError: as `replace_file`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{kind}.tmp") for kind in ("new", "old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        os.replace(old, path)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        with _named_when_it_fails(path):
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    _flush_to_disk(file)
            if path.exists():  # rename(2) does not replace a directory that holds something
                os.replace(path, old)
            try:
                os.replace(new, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _named_when_it_fails(path: Path) -> Iterator[None]:
    """A full disk raises without a file name, and not always OSError: say which output it hit, and that it was that."""
    try:
        yield
    except OSError as error:
        error.add_note(_outcome(path))
        raise
    except Exception as error:
        if not _FAILED_WRITE.search(str(error)):
            raise
        failed = WriteError(f"a write failed, as on a full disk ({str(error).splitlines()[0]})")
        failed.add_note(_outcome(path))
        raise failed from error


def _outcome(path: Path) -> str:
    return f"while writing {path}, which {'is as it was before' if path.exists() else 'was not written'}"
