"""`python -m sparsity_forcing.evidence [EXPERIMENT …]`: trains what has not run yet, then writes docs/evidence.md.

Needs the pipeline's base and data (`make pipeline`). Every experiment is a process of its own; what was interrupted
goes on from its last checkpoint. The last line printed is one JSON object with the figures that are quoted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from sparsity_forcing.__main__ import explains_itself, set_environment
from sparsity_forcing.evidence import gradient
from sparsity_forcing.evidence.arms import ARMS
from sparsity_forcing.evidence.experiment import run_arm, run_base
from sparsity_forcing.evidence.summary import write_summary
from sparsity_forcing.params import load_params

OTHERS = {"base": run_base, "gradient": gradient.measure}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    experiments: Annotated[list[str] | None, typer.Argument(help="Names; all where none is given.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Experiments at a time; one CPU thread each.")] = 2,
    only_summary: Annotated[bool, typer.Option(help="Run nothing; write the page from what has run.")] = False,
) -> None:
    """Runs experiments and writes their summary."""
    root = Path(".")
    known = [*OTHERS, *ARMS]
    names = experiments or known
    if unknown := sorted(set(names) - set(known)):
        typer.echo(f"evidence: there is no experiment {', '.join(unknown)}; one of {', '.join(known)}", err=True)
        raise typer.Exit(2)
    params = load_params(root / "params.yaml")
    if not only_summary:
        set_environment(params, root)  # before the processes: one thread each
        with ThreadPoolExecutor(jobs) as pool:
            ended = list(pool.map(_in_a_process, names))
        if failed := [name for name, code in zip(names, ended, strict=True) if code]:
            typer.echo(f"evidence: {', '.join(failed)} did not finish; start again to go on", err=True)
            raise typer.Exit(1)
    print(json.dumps(write_summary(params, root)))


def run_one(name: str) -> int:
    """One experiment in this process; its exit code."""
    root = Path(".")
    try:
        params = load_params(root / "params.yaml")
        OTHERS[name](params, root) if name in OTHERS else run_arm(ARMS[name], params, root)
    except Exception as error:
        if not explains_itself(error):
            raise
        print(f"evidence, {name}: {error}", file=sys.stderr)
        return 1
    return 0


def _in_a_process(name: str) -> int:
    code = f"import sys; from sparsity_forcing.evidence.__main__ import run_one; sys.exit(run_one({name!r}))"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


if __name__ == "__main__":
    app()
