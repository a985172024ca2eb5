"""`make smoke` and the tests run in a scratch copy of the workspace, so that they never touch your results."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from sparsity_forcing.lineage import RESULT_PATHS

NOT_COPIED = ("tests", "docker", *RESULT_PATHS)


def copy_workspace(source: Path, target: Path, preset: str) -> None:
    """Copies what git tracks or would track, as it is on disk, without results; ``preset`` becomes params.yaml.

    The copy is a git repository of its own, without a commit. An earlier copy at ``target`` is removed.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
        + [f":(exclude){name}" for name in NOT_COPIED],
        cwd=source,
        check=True,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(target, ignore_errors=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (source / name).is_file():  # git also lists files that were deleted on disk
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    (target / "metrics/evidence").mkdir(parents=True)  # the stage report reads what is in it
    shutil.copy2(source / "presets" / f"{preset}.yaml", target / "params.yaml")
    subprocess.run(["git", "init", "--quiet"], cwd=target, check=True)


def main(
    target: Annotated[Path, typer.Argument(help="The folder to make; one that is there is replaced.")],
    preset: Annotated[str, typer.Option(help="A file of presets/, without .yaml.")] = "smoke",
) -> None:
    """Copies the workspace in the current folder to TARGET."""
    copy_workspace(Path("."), target, preset)


if __name__ == "__main__":
    typer.run(main)
