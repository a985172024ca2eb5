"""Where a result comes from: the commit of the code, the md5s of the data and models, the versions of the packages,
the machine."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

# What the commands of this project write into git themselves: results, and pages that quote them.
RESULT_PATHS = ("dvc.lock", "metrics", "plots", "reports")
OUTPUT_PATHS = (*RESULT_PATHS, "docs/evidence.md", "README.md")
PACKAGES = (
    *("sparsity-forcing", "torch", "transformers", "accelerate", "numpy", "pandas", "pyarrow", "scikit-learn", "scipy"),
    *("lmms_eval", "mlflow", "prefect", "dvc", "triton", "peft", "trl", "math-verify"),
)


class LineageError(ValueError):
    """dvc.yaml cannot be read."""


@dataclass(frozen=True)
class GitState:
    """``commit``: full hash, or "none" without git, a repository or a first commit; ``dirty``: code differs from it."""

    commit: str
    dirty: bool


@dataclass(frozen=True)
class Lineage:
    git: GitState
    data: dict[str, str]  # path of what a stage read -> md5
    versions: dict[str, str]  # package -> version


def read_lineage(root: Path, stage: str) -> Lineage:
    """All of it, for what ``stage`` makes in the workspace at ``root``."""
    return Lineage(git_state(root), input_md5s(root, stage), versions())


def git_state(root: Path) -> GitState:
    """What the commands of this project write (`OUTPUT_PATHS`) does not make the state dirty."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None:
        return GitState("none", dirty=True)
    changes = _git(root, "status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in OUTPUT_PATHS))
    return GitState(commit, dirty=changes != "")


def input_md5s(root: Path, stage: str) -> dict[str, str]:
    """Path -> md5 of what ``stage`` reads that another stage wrote, by dvc.yaml.

    The md5s are of what lies there now, and those that dvc.lock gets for the same content: dvc.lock itself still holds
    those of the run before while a stage runs.
    """
    stages = _read_yaml(root / "dvc.yaml").get("stages", {})
    written = {
        next(iter(out)) if isinstance(out, dict) else out
        for declared in stages.values()
        for kind in ("outs", "metrics", "plots")
        for out in declared.get(kind, [])
    }
    read = [path for path in stages.get(stage, {}).get("deps", []) if path in written]
    return {path: dvc_md5(root / path) for path in read if (root / path).exists()}


def dvc_md5(path: Path) -> str:
    """The md5 that DVC knows a file by, or a directory: the md5 of a JSON list of its files and their md5s, `.dir`."""
    if path.is_file():
        return file_digest(path, "md5")
    files = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.relative_to(path).parts)
    entries = [{"md5": file_digest(file, "md5"), "relpath": file.relative_to(path).as_posix()} for file in files]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's version and those of ``packages``, of the ones that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_digest(paths: Sequence[Path | str]) -> str:
    """SHA-256 over the names and the code of source files: changes when the code does, wherever it is installed.

    Comments, docstrings and layout are no code: a checkpoint outlives their edits. Another Python may read the same
    source as another tree.

    Args:
        paths: modules or packages (folders, with all below them), by their path below this package (``rl``,
            ``scoring.py``) or by an absolute one.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / path for path in paths), key=lambda path: (path.name, path)):
        if not path.exists():
            raise FileNotFoundError(f"{path} is named as code that decides a result, but is not there")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(path.parent).as_posix()}\0".encode())
            digest.update(_code_of(file).encode())
    return digest.hexdigest()


def _code_of(file: Path) -> str:
    """A Python file's syntax tree without docstrings; the digest of what Python cannot read, a compiled module say."""
    source = file.read_bytes()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return hashlib.sha256(source).hexdigest()
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def file_digest(path: Path, algorithm: str) -> str:
    """Digest of a file's content in hexadecimal digits; ``algorithm`` as in `hashlib`.

    A file is read again only when it has changed: weights are large.
    """
    state = path.stat()
    return _file_digest(path.absolute(), algorithm, state.st_mtime_ns, state.st_size)


@cache
def _file_digest(path: Path, algorithm: str, mtime_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def hardware() -> str:
    """The machine as a reader needs to know it: processor or GPU, and the threads in use."""
    import torch  # here, so that the commands that only need a commit start quickly

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    threads = torch.get_num_threads()
    return f"{_processor_name()}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''} used"


def _processor_name() -> str:
    return processor_field("model name") or platform.processor() or platform.machine()


def processor_field(name: str) -> str | None:
    """What Linux says of the first processor under ``name``; None where it says nothing, or the system is another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(
        (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name), None
    )


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
