"""A workspace as the flows see it: is it usable, what in it is out of date, run one stage of it through DVC."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import yaml

from sparsity_forcing.params import Params, ParamsError, load_params
from sparsity_forcing.places import require_places

Outcome = Literal["ran", "restored from cache", "up to date"]
GRACE_SECONDS = 25  # Prefect kills a cancelled run after 30: training saves within this time
WRONG_INPUT = 2  # the exit code with which a stage says that trying again cannot help
HINTS = (
    "To track the changes with git",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc ",
)


class StageError(RuntimeError):
    """A stage ended with an error; ``exit_code`` is its own, 2 where trying again cannot help."""

    def __init__(self, stage: str, exit_code: int) -> None:
        super().__init__(stage, exit_code)
        self.stage, self.exit_code = stage, exit_code

    def __str__(self) -> str:
        return f"stage {self.stage} failed with exit code {self.exit_code}; its own words are in the log above"


class WorkspaceError(RuntimeError):
    """DVC cannot work here: another run is in progress, or its files are damaged."""


def check_workspace(root: Path) -> Params:
    """Validates params.yaml before anything runs.

    Raises:
        ParamsError: params.yaml is not usable, names a model inside an output, or lacks a key that dvc.yaml depends on.
            (DVC notices that too, but only after it has removed the outputs of the stage.)
    """
    params = load_params(root / "params.yaml")
    require_places(params, root)
    given = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    needed = {name for stage in stages.values() for name in stage.get("params", [])}
    if missing := sorted(name for name in needed if not _has(given, name)):
        raise ParamsError(
            f"{root / 'params.yaml'} lacks {', '.join(missing)}: DVC needs what dvc.yaml names written out"
        )
    _work_with_or_without_git(root)
    return params


def is_up_to_date(root: Path) -> bool:
    """Whether `dvc repro` would have nothing to do."""
    done = subprocess.run(_dvc("status", "--json"), cwd=root, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise WorkspaceError(_explain(done.stderr))
    return json.loads(done.stdout) == {}


def reproduce(stage: str, root: Path, log: Callable[[str], None] = print) -> Outcome:
    """Runs ``stage`` through DVC if its inputs, code or parameters changed. Every line it prints goes to ``log``.

    An exception while it runs (a cancelled flow, Ctrl-C) stops DVC and the stage below it: asked first, so that
    training can save, and killed after `GRACE_SECONDS`.

    Raises:
        StageError: the stage ended with an error.
        WorkspaceError: another DVC process works here, or DVC's files are damaged.
    """
    lines: list[str] = []
    process = subprocess.Popen(
        _dvc("repro", "--single-item", stage),
        cwd=root,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a process group of its own: DVC, its shell and the stage are stopped as one
    )
    try:
        for line in process.stdout:
            line = line.rstrip()
            lines.append(line)
            if line and not line.strip().startswith(HINTS):
                log(line)
        process.wait()
    except BaseException:
        _stop(process)
        raise
    output = "\n".join(lines)
    if process.returncode == 0:
        return _outcome(output)
    if code := re.search(r"failed to run: .*, exited with (-?\d+)", output):
        raise StageError(stage, int(code[1]))
    raise WorkspaceError(_explain(output))


def _outcome(output: str) -> Outcome:
    if "didn't change, skipping" in output:
        return "up to date"
    return "restored from cache" if "is cached - skipping run" in output else "ran"


def _stop(process: subprocess.Popen) -> None:
    """DVC itself goes at once when asked to; the stage below it may still be saving, so wait for the whole group."""
    deadline = time.monotonic() + GRACE_SECONDS
    alive = _signal_group(process, signal.SIGTERM)
    while alive and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.1)
        alive = _signal_group(process, 0)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> bool:
    """Whether there was anyone in the group to be signalled."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _explain(output: str) -> str:
    reason = "\n".join(line for line in output.splitlines() if "ERROR" in line) or output.strip()
    if "Unable to acquire lock" in output or "is busy, it is being blocked by" in output:
        return f"another DVC run works in this workspace; wait for it or stop it, then start again. DVC says:\n{reason}"
    return f"DVC cannot work in this workspace:\n{reason}"


def _has(values: dict, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _work_with_or_without_git(root: Path) -> None:
    """DVC refuses a folder that is not a git repository unless told to. Lineage then says commit "none"."""
    inside = _succeeds("git", "-C", str(root), "rev-parse", "--is-inside-work-tree")
    local = root / ".dvc" / "config.local"
    told = local.exists() and "no_scm = true" in local.read_text(encoding="utf-8")
    if inside and told:
        subprocess.run(_dvc("config", "--local", "--unset", "core.no_scm"), cwd=root, check=True)
    elif not inside and not told:
        with local.open("a", encoding="utf-8") as file:
            file.write("[core]\n    no_scm = true\n")


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _dvc(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _environment() -> dict[str, str]:
    """dvc.yaml says `python`: this one, whatever PATH the worker was started with. Lines come as they are printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}
