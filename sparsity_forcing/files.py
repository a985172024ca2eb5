"""Outputs that are whole or absent: everything is written under a temporary name beside its place, then renamed.

A process killed at any moment leaves the old output or the new one, never half of one. The temporary names start with
a dot and hold ``.tmp`` (git and DVC ignore them); what a killed run left is removed by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text_atomic(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8; parents are created."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | Path, value: object) -> None:
    """Writes JSON as people and git like it: two spaces, sorted keys, a newline at the end.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be written as JSON: {error}") from None
    write_text_atomic(path, text + "\n")


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path with the same suffix; on success what was written there becomes ``path``.

    On any error the temporary file is removed and the old ``path`` stays as it was. One writer per path at a time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.new.tmp{path.suffix}")  # a killed run's is taken over by the next
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        _note_place(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_directory(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary directory beside ``path``; on success it becomes ``path``, with all that is in it.

    On any error it is removed and the old ``path`` stays as it was. One writer per path at a time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{kind}.tmp") for kind in ("new", "old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        os.replace(old, path)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
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
    except BaseException as error:
        _note_place(error, path)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _note_place(error: BaseException, path: Path) -> None:
    """A full disk raises without a file name: say which output it hit."""
    if isinstance(error, OSError):
        state = "is as it was before" if path.exists() else "was not written"
        error.add_note(f"while writing {path}, which {state}")
