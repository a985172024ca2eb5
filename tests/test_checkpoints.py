"""Checkpoints: whole or passed over, never another configuration's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsity_forcing.checkpoints import Checkpoints, fingerprint


def save(checkpoints: Checkpoints, step: int, text: str = "") -> Path:
    def write(directory: Path) -> None:
        (directory / "weights").mkdir()
        (directory / "weights" / "model.bin").write_text(text or f"weights of step {step}")
        (directory / "state.json").write_text(str(step))

    return checkpoints.save(step, write)


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", "abc")


def test_nothing_is_found_where_nothing_was_saved(checkpoints):
    assert checkpoints.latest() is None


def test_the_newest_is_found_and_the_oldest_go(checkpoints):
    for step in (5, 10, 100):
        save(checkpoints, step)
    step, path = checkpoints.latest()
    assert step == 100
    assert (path / "weights" / "model.bin").read_text() == "weights of step 100"
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-000010", "step-000100"]


def test_a_step_saved_again_replaces_the_first(checkpoints):
    save(checkpoints, 5, "first")
    save(checkpoints, 5, "second")
    assert (checkpoints.latest()[1] / "weights" / "model.bin").read_text() == "second"


def truncate(path: Path) -> None:
    (path / "weights" / "model.bin").write_text("")


def flip_one_bit(path: Path) -> None:
    file = path / "weights" / "model.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


def lose_a_file(path: Path) -> None:
    (path / "state.json").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", '{"sha256": 3}', '{"sha256": null}', "\x00"])
def test_a_damaged_manifest_is_passed_over(checkpoints, caplog, content):
    save(checkpoints, 5)
    (save(checkpoints, 10) / "manifest.json").write_text(content)
    assert checkpoints.latest()[0] == 5
    assert "step-000010 is corrupted (manifest.json" in caplog.text


@pytest.mark.parametrize(
    "damage, reason",
    [
        (truncate, "weights/model.bin has another checksum"),
        (flip_one_bit, "weights/model.bin has another checksum"),
        (lose_a_file, "state.json is missing"),
        (lose_the_manifest, "manifest.json"),
    ],
)
def test_a_corrupted_one_is_named_and_the_one_before_is_used(checkpoints, caplog, damage, reason):
    save(checkpoints, 5)
    damage(save(checkpoints, 10))
    assert checkpoints.latest()[0] == 5
    assert "step-000010 is corrupted" in caplog.text
    assert reason in caplog.text
    assert "falling back to the one before" in caplog.text


def test_when_all_are_corrupted_there_is_none(checkpoints):
    truncate(save(checkpoints, 5))
    assert checkpoints.latest() is None


def test_an_error_while_saving_leaves_the_earlier_ones(checkpoints):
    save(checkpoints, 5)

    def full_disk(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(10, full_disk)
    assert checkpoints.latest()[0] == 5
    assert [p.name for p in checkpoints.directory.iterdir()] == ["step-000005"]


def test_what_a_killed_save_left_is_not_a_checkpoint(checkpoints):
    save(checkpoints, 5)
    (checkpoints.directory / ".step-000010.new.tmp").mkdir()
    assert checkpoints.latest()[0] == 5


def test_another_configuration_does_not_see_them_but_clears_them(tmp_path, checkpoints):
    save(checkpoints, 5)
    other = Checkpoints(tmp_path / "checkpoints", "def")
    assert other.latest() is None
    other.clear()
    assert not (tmp_path / "checkpoints").exists()


def weights(directory: Path) -> None:
    (directory / "weights").mkdir()
    (directory / "weights" / "model.bin").write_text("chosen")


def test_chosen_weights_are_found_by_their_step(checkpoints):
    path = checkpoints.save_best(45, weights)
    assert path.name == "best-000045"
    assert checkpoints.best(45) == path
    assert checkpoints.latest() is None  # nothing to resume from


@pytest.mark.parametrize("damage", [truncate, flip_one_bit, lose_the_manifest])
def test_damaged_chosen_weights_are_named_and_not_given(checkpoints, caplog, damage):
    damage(checkpoints.save_best(45, weights))
    assert checkpoints.best(45) is None
    assert "best-000045 are corrupted" in caplog.text


def test_chosen_weights_stay_as_long_as_a_checkpoint_may_name_them(checkpoints):
    for step in (5, 10, 15):  # each checkpoint names the newest of its time
        checkpoints.save_best(step - 2, weights)
        save(checkpoints, step)
    checkpoints.save_best(16, weights)
    assert checkpoints.best(3) is None
    assert all(checkpoints.best(step) for step in (8, 13, 16))
    save(checkpoints, 20)
    assert checkpoints.best(8) is None
    assert all(checkpoints.best(step) for step in (13, 16))


def test_fewer_than_two_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 2, got 1"):
        Checkpoints(tmp_path, "abc", keep=1)


def test_a_fingerprint_names_values_and_contents(tmp_path):
    file = tmp_path / "data"
    file.write_text("one")
    first = fingerprint({"a": 1, "b": [2]}, (file,))
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert fingerprint({"b": [2], "a": 1}, (file,)) == first
    assert fingerprint({"a": 1, "b": [3]}, (file,)) != first
    file.write_text("two")
    assert fingerprint({"a": 1, "b": [2]}, (file,)) != first


def test_the_manifest_lists_every_file(checkpoints):
    manifest = json.loads((save(checkpoints, 5) / "manifest.json").read_text())
    assert manifest["step"] == 5
    assert sorted(manifest["sha256"]) == ["state.json", "weights/model.bin"]


def test_what_another_configuration_differs_in_is_told(tmp_path, caplog):
    digest = "0" * 64
    there = {"train": {"beta": 6.0, "lora": {"r": 32}}, "files": {"models/base/model.safetensors": digest}}
    save(Checkpoints(tmp_path, "abc", made_of=there), 20)
    save(Checkpoints(tmp_path, "unknown"), 5)
    here = {"train": {"beta": 0.2, "lora": None}, "files": {"models/base/model.safetensors": "1" * 64}}
    checkpoints = Checkpoints(tmp_path, "def", made_of=here)
    assert checkpoints.latest() is None
    assert checkpoints.latest() is None  # told once
    assert checkpoints.refused() == [
        f"{tmp_path / 'abc'} (step 20) is of another configuration: files.models/base/model.safetensors has changed; "
        "train.beta was 6.0, is 0.2; train.lora.r was 32, is None",
        f"{tmp_path / 'unknown'} (step 5) is of another configuration",
    ]
    assert [
        f"not resumed: {line}; it is removed when this run has its result" for line in checkpoints.refused()
    ] == caplog.messages
    caplog.clear()
    assert Checkpoints(tmp_path, "abc", made_of=there).latest()[0] == 20
    assert caplog.messages == []
