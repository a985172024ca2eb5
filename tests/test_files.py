"""Outputs are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from full_disk import files_at_most
from safetensors.torch import save_file

from sparsity_forcing.files import WriteError, replace_directory, replace_file, write_json_atomic, write_text_atomic


def half_write(replacement, write, error: Exception) -> None:
    """Begins to write through ``replacement`` and fails."""
    with replacement as temporary:
        write(temporary)
        raise error


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def test_json_is_readable_and_stable(tmp_path):
    path = tmp_path / "metrics" / "stage.json"
    write_json_atomic(path, {"b": 1, "a": [0.5, None], "τ": 2})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    0.5,\n    null\n  ],\n  "b": 1,\n  "τ": 2\n}\n'
    assert leftovers(tmp_path) == []


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "stage.json"
    write_json_atomic(path, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"stage\.json"):
        write_json_atomic(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 1.0}


def test_temporary_name_keeps_the_suffix_that_writers_look_at(tmp_path):
    with replace_file(tmp_path / "rows.parquet") as temporary:
        temporary.write_text("x")
        assert temporary.suffix == ".parquet"
        assert temporary.name.startswith(".")


def test_file_has_the_permissions_of_any_new_file(tmp_path):
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("x")
    write_text_atomic(atomic, "x")
    assert atomic.stat().st_mode == plain.stat().st_mode


def test_full_disk_keeps_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left") as caught:
        half_write(replace_file(path), lambda temporary: temporary.write_text("half"), full_disk())
    assert path.read_text() == "old"
    assert "rows.parquet" in caught.value.__notes__[0]
    assert leftovers(tmp_path) == []


def test_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "models" / "base"
    for content in ("one", "two"):
        with replace_directory(path) as new:
            (new / "nested").mkdir()
            (new / "nested" / content).write_text(content)
    assert [file.name for file in path.rglob("*") if file.is_file()] == ["two"]
    assert leftovers(tmp_path) == []


def test_directory_survives_a_full_disk(tmp_path):
    path = tmp_path / "base"
    with replace_directory(path) as new:
        (new / "weights").write_text("old")
    with pytest.raises(OSError, match="No space left") as caught:
        half_write(replace_directory(path), lambda new: (new / "weights").write_text("half"), full_disk())
    assert (path / "weights").read_text() == "old"
    assert "is as it was before" in caught.value.__notes__[0]
    assert leftovers(tmp_path) == []


def save_torch(tensors: dict, path: Path) -> None:
    torch.save(tensors, path)


@pytest.mark.parametrize("save", [save_file, save_torch])
@pytest.mark.parametrize("replace", [replace_file, replace_directory])
def test_a_disk_that_is_full_of_weights_is_an_os_error_too(tmp_path, save, replace):
    """safetensors and torch raise errors of their own for it."""

    def write(place: Path) -> None:
        save({"weights": torch.zeros(100_000)}, place / "weights" if place.is_dir() else place)

    with (
        files_at_most(10_000),
        pytest.raises(WriteError, match="as on a full disk") as caught,
        replace(tmp_path / "x") as new,
    ):
        write(new)
    assert caught.value.__notes__ == [f"while writing {tmp_path / 'x'}, which was not written"]
    assert caught.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"^a bug$") as caught:
        half_write(replace_file(tmp_path / "x"), lambda temporary: None, RuntimeError("a bug"))
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("killed_at_rename", [1, 2])
def test_directory_survives_a_kill_at_either_rename(tmp_path, killed_at_rename):
    """The child dies without any clean-up just before the first or the second rename of the swap."""
    path = tmp_path / "base"
    with replace_directory(path) as new:
        (new / "weights").write_text("old")

    child = os.fork()
    if child == 0:
        replace, calls = os.replace, []

        def dying_replace(source, target):
            calls.append(source)
            if len(calls) == killed_at_rename:
                os.kill(os.getpid(), 9)
            replace(source, target)

        os.replace = dying_replace
        with replace_directory(path) as new:
            (new / "weights").write_text("new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == 9

    seen = []  # the old output is put back before anything else is done
    with pytest.raises(RuntimeError, match="later failure"):
        half_write(
            replace_directory(path),
            lambda new: seen.append((path / "weights").read_text()),
            RuntimeError("later failure"),
        )
    assert seen == ["old"]
    assert (path / "weights").read_text() == "old"
    assert leftovers(tmp_path) == []
