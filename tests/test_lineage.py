"""Lineage without git, without a commit, clean, dirty; md5s out of DVC's files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sparsity_forcing.lineage import GitState, LineageError, git_state, input_md5s, output_md5s, read_lineage


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
    assert git_state(repository) == GitState(head, dirty=False)

    (repository / "code.py").write_text("a = 2\n")
    assert git_state(repository) == GitState(head, dirty=True)
    commit(repository)
    (repository / "new.py").write_text("")
    assert git_state(repository).dirty


def test_md5s_of_what_a_stage_reads(tmp_path):
    (tmp_path / "dvc.yaml").write_text("stages:\n  train:\n    deps: [models/base, sparsity_forcing/rl]\n")
    assert output_md5s(tmp_path) == {}
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  base: {outs: [{path: models/base, md5: a.dir}, {path: metrics/base.json, md5: b}]}\n"
    )
    assert output_md5s(tmp_path) == {"models/base": "a.dir", "metrics/base.json": "b"}
    assert input_md5s(tmp_path, "train") == {"models/base": "a.dir"}
    assert input_md5s(tmp_path, "no such stage") == {}


def test_a_damaged_lock_file_is_named_with_the_way_out(tmp_path):
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\n: [")
    with pytest.raises(LineageError, match=r"dvc\.lock is not valid YAML(.|\n)*git checkout dvc\.lock"):
        read_lineage(tmp_path)


def test_versions_name_what_matters_for_a_result(tmp_path):
    import torch

    versions = read_lineage(tmp_path).versions
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"python", "transformers", "sparsity-forcing"} <= set(versions)
