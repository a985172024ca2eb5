"""Where a result comes from: the commit of the code, the md5s of the data and models, the versions of the packages,
the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml

OUTPUT_PATHS = ("dvc.lock", "metrics", "plots", "reports")  # what the pipeline itself writes into git
PACKAGES = (
    *("sparsity-forcing", "torch", "transformers", "accelerate", "numpy", "pandas", "pyarrow", "scikit-learn"),
    *("lmms_eval", "mlflow", "prefect", "dvc", "triton"),
)


class LineageError(ValueError):
    """dvc.yaml or dvc.lock cannot be read."""


@dataclass(frozen=True)
class GitState:
    """``commit``: full hash, or "none" without git, a repository or a first commit; ``dirty``: code differs from it."""

    commit: str
    dirty: bool


@dataclass(frozen=True)
class Lineage:
    git: GitState
    data: dict[str, str]  # path of a DVC output -> md5
    versions: dict[str, str]  # package -> version


def read_lineage(root: Path) -> Lineage:
    """All of it, for the workspace at ``root``."""
    return Lineage(git_state(root), output_md5s(root), versions())


def git_state(root: Path) -> GitState:
    """What the pipeline writes itself (metrics, plots, reports, dvc.lock) does not make the state dirty."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return GitState("none", dirty=True)
    changes = _git(root, "status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in OUTPUT_PATHS))
    return GitState(commit, dirty=changes != "")


def output_md5s(root: Path) -> dict[str, str]:
    """Path -> md5 of every output in dvc.lock; empty before the first run."""
    stages = _read_yaml(root / "dvc.lock").get("stages", {})
    return {
        out["path"]: out.get("md5") or out.get("hash", "unknown")
        for stage in stages.values()
        for out in stage.get("outs", [])
    }


def input_md5s(root: Path, stage: str) -> dict[str, str]:
    """Path -> md5 of what ``stage`` reads that another stage wrote: its dependencies in dvc.yaml, as in dvc.lock."""
    declared = _read_yaml(root / "dvc.yaml").get("stages", {}).get(stage, {}).get("deps", [])
    known = output_md5s(root)
    return {path: known[path] for path in declared if path in known}


def versions() -> dict[str, str]:
    """Python's version and those of the packages that are installed, of the ones that matter for a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """The machine as a reader needs to know it: processor or GPU, and the threads in use."""
    import torch  # here, so that the commands that only need a commit start quickly

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    threads = torch.get_num_threads()
    return f"{_processor_name()}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''} used"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where it fails or git is not installed."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read_yaml(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise LineageError(f"{path} is not valid YAML: {error}; restore it with `git checkout {path.name}`") from None
    return values or {}
