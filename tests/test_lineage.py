"""Lineage without git, without a commit, clean, dirty; md5s out of DVC's files."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from sparsity_forcing.lineage import GitState, LineageError, code_digest, git_state, input_md5s, read_lineage, versions


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(root: Path) -> str:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "code")
    return git(root, "rev-parse", "HEAD")


def test_without_a_repository_or_a_commit_or_git_itself(tmp_path, repository, monkeypatch):
    assert git_state(repository) == GitState("none", dirty=True)
    (repository / ".git").rename(repository / "gone")
    assert git_state(repository) == GitState("none", dirty=True)
    monkeypatch.setenv("PATH", "")
    assert git_state(repository) == GitState("none", dirty=True)


def test_code_makes_a_repository_dirty_and_the_pipelines_own_outputs_do_not(repository):
    (repository / "code.py").write_text("a = 1\n")
    (repository / "metrics").mkdir()
    (repository / "metrics" / "train.json").write_text("{}")
    head = commit(repository)
    assert git_state(repository) == GitState(head, dirty=False)

    (repository / "metrics" / "train.json").write_text('{"loss": 1}')
    (repository / "dvc.lock").write_text("schema: '2.0'\n")
    (repository / "README.md").write_text("1 of 2\n")
    assert git_state(repository) == GitState(head, dirty=False)

    (repository / "code.py").write_text("a = 2\n")
    assert git_state(repository) == GitState(head, dirty=True)
    commit(repository)
    (repository / "new.py").write_text("")
    assert git_state(repository).dirty


STAGES = {
    "base": {"cmd": "true", "outs": [{"models/base": {"persist": True}}], "metrics": ["metrics/base.json"]},
    "train": {"cmd": "true", "deps": ["models/base", "metrics/base.json", "code.py"], "outs": ["models/policy"]},
}


@pytest.fixture
def written(repository) -> Path:
    """A workspace in which the stage `base` has written a model."""
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    for name in ("models/base/model.safetensors", "models/base/deep/config.json", "metrics/base.json", "code.py"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(f"content of {name}, τ")
    return repository


def test_md5s_of_what_a_stage_reads_are_those_that_dvc_gives_the_same_content(written):
    found = input_md5s(written, "train")
    (written / "models/policy").mkdir()
    with contextlib.chdir(written):
        Repo.init().close()
        with Repo() as repo:
            repo.commit(force=True)
    locked = yaml.safe_load((written / "dvc.lock").read_text())["stages"]["train"]["deps"]
    assert found == {dep["path"]: dep["md5"] for dep in locked if dep["path"] != "code.py"}
    assert input_md5s(written, "no such stage") == {}


def test_md5s_are_of_what_is_there_now_not_of_what_dvc_locked(written):
    before = input_md5s(written, "train")
    lock = {"base": {"outs": [{"path": "models/base", "md5": "of the run before"}]}}
    (written / "dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
    assert input_md5s(written, "train") == before
    (written / "models/base/model.safetensors").write_text("other weights")
    (written / "metrics/base.json").unlink()
    assert list(input_md5s(written, "train")) == ["models/base"]
    assert input_md5s(written, "train")["models/base"] != before["models/base"]


def test_a_damaged_dvc_file_is_named_with_the_way_out(tmp_path):
    (tmp_path / "dvc.yaml").write_text("<<<<<<< HEAD\n: [")
    with pytest.raises(LineageError, match=r"dvc\.yaml is not valid YAML(.|\n)*git checkout dvc\.yaml"):
        read_lineage(tmp_path, "train")


def test_versions_name_what_matters_for_a_result(tmp_path):
    import torch

    found = read_lineage(tmp_path, "train").versions
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"python", "transformers", "sparsity-forcing"} <= set(found)
    assert set(versions(["numpy", "not-installed"])) == {"python", "numpy"}


def test_a_code_digest_names_source_files_and_nothing_else(tmp_path):
    def package(place: Path) -> Path:
        (place / "own/deep").mkdir(parents=True)
        (place / "own/a.py").write_text("a = 1\n")
        (place / "own/deep/b.py").write_text("b = 1\n")
        return place / "own"

    first, second = package(tmp_path / "one"), package(tmp_path / "two")
    assert code_digest([first]) == code_digest([second])  # wherever it is installed
    (first / "notes.txt").write_text("no code")
    assert code_digest([first]) == code_digest([second])
    (first / "deep/b.py").write_text("b = 2\n")
    assert code_digest([first]) != code_digest([second])
    before = code_digest([second])
    (second / "a.py").write_text('"""What it is."""\n\na = (1)  # one\n')
    assert code_digest([second]) == before  # the same code
    (second / "a.py").write_bytes("# -*- coding: latin-1 -*-\na = 1  # é\n".encode("latin-1"))
    assert code_digest([second]) == before
    seen = {before}
    for no_source in (b"a = 1 +\n", b"\x7fELF\0\xff compiled", b"\x7fELF\0\xfe compiled"):
        (second / "a.py").write_bytes(no_source)
        seen.add(code_digest([second]))
    assert len(seen) == 4
    assert code_digest([second / "a.py"]) != code_digest([second])
    assert len({code_digest(["rl"]), code_digest(["scoring.py"]), code_digest(["rl", "scoring.py"])}) == 3
    with pytest.raises(FileNotFoundError, match="no_such_package is named as code"):
        code_digest(["no_such_package"])
