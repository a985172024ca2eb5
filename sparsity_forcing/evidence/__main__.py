"""`python -m sparsity_forcing.evidence [EXPERIMENT …]`: runs what has not run yet, then writes docs/evidence.md.

README.md gets what that page says in short. A result of other code has to be measured again; after a change of code
that leaves results as they are (`dvc repro train` gives the same policy bit for bit, say) `--accept-code` keeps it.

Needs what the pipeline made (`make pipeline`). Every experiment is a process of its own; a training that was
interrupted goes on from its last checkpoint. The last line printed is one JSON object with the figures that are quoted.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from sparsity_forcing.__main__ import explains_itself, explanation, set_environment
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import read_rows
from sparsity_forcing.evidence.arms import ARMS
from sparsity_forcing.evidence.experiment import INPUTS, run_arm, run_base, why_not_undistorted
from sparsity_forcing.evidence.summary import UNTRAINED, accept_results, outdated, pages_with, write_summary
from sparsity_forcing.inputs import POLICY, TEST, TRAIN, require_inputs
from sparsity_forcing.params import Params, ParamsError, load_params

ROOT = Path(".")
MEASURED = {"base": run_base, **{name: module.measure for name, module in UNTRAINED.items()}}
OF_THE_POLICY = {"lengths", "turns"}
WHY_NOT = {name: module.why_not for name, module in UNTRAINED.items()} | {"undistorted": why_not_undistorted}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    experiments: Annotated[list[str] | None, typer.Argument(help="Names; all where none is given.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Experiments at a time, one CPU thread each.")] = 2,
    only_summary: Annotated[bool, typer.Option(help="Run nothing; write the pages from what has run.")] = False,
    accept_code: Annotated[
        bool,
        typer.Option(help="Count the named results as current though the code changed; of a training the base's too."),
    ] = False,
) -> None:
    """Runs experiments and writes their summary."""
    signal.signal(signal.SIGTERM, _stop)
    known = [*MEASURED, *ARMS]
    if unknown := sorted(set(experiments or ()) - set(known)):
        typer.echo(f"evidence: there is no experiment {', '.join(unknown)}; one of {', '.join(known)}", err=True)
        raise typer.Exit(2)
    try:
        params = load_params(ROOT / "params.yaml")
        possible = [name for name in known if name not in WHY_NOT or not WHY_NOT[name](params)]
        names = list(dict.fromkeys(experiments or possible))
        if set(names) & set(ARMS):  # what they are compared with
            names = list(dict.fromkeys(["base", *names]))
        require_inputs(ROOT, INPUTS | ({POLICY: "train"} if OF_THE_POLICY & set(names) else {}))
        require_same_data(params, ROOT)
        for name in names:
            if name in ARMS:
                ARMS[name].params(params)
        set_environment(params, ROOT)  # before the processes: one thread each
        if accept_code:
            typer.echo(f"evidence: accepted {', '.join(accept_results(names, params, ROOT)) or 'nothing'}", err=True)
        pages_with({}, params, ROOT)  # what is wrong with a page is found before the hours
        failed = [] if only_summary else run_all(names, jobs)
        summary = write_summary(params, ROOT)
        if others := outdated(params, ROOT):
            typer.echo(
                "evidence: made with other parameters, data, base, policy or code, so not in the tables: "
                f"{', '.join(others)}. `make evidence` runs them again; if the code alone has changed, and no result "
                "with it, --accept-code with their names counts them",
                err=True,
            )
    except Exception as error:
        if not explains_itself(error):
            raise
        typer.echo(f"evidence: {explanation(error)}", err=True)
        raise typer.Exit(2) from None
    if failed:
        typer.echo(f"evidence: did not finish, see above: {', '.join(failed)}; what ran is kept", err=True)
    print(json.dumps(summary))
    if failed:
        raise typer.Exit(1)


def require_same_data(params: Params, root: Path) -> None:
    """Raises ParamsError where the splits are not what `held_out` and `undistorted` would go on with."""
    if params.data.source != "digits":
        return
    for path, split in ((TEST, "test"), (TRAIN, "train")):
        rows = read_rows(root / path)
        if rows[-1] != digits_row(params.data.digits, params.seed, split, len(rows) - 1):
            raise ParamsError(
                f"{path} was not made with these parameters of data.digits and this code; run `make pipeline` first"
            )


def run_all(names: Sequence[str], jobs: int) -> list[str]:
    """Runs experiments, ``jobs`` at a time, each in a process; the names of those that failed. Stopped, stops all."""
    running: list[subprocess.Popen] = []
    stopped = threading.Event()

    def one(name: str) -> int:
        if stopped.is_set():
            return 1
        process = _start(name)
        running.append(process)
        return process.wait()

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(one, names))
        except BaseException:
            stopped.set()
            for process in running:
                process.terminate()
            raise
    return [name for name, code in zip(names, codes, strict=True) if code]


def run_one(name: str) -> int:
    """One experiment in this process; its exit code."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        params = load_params(ROOT / "params.yaml")
        MEASURED[name](params, ROOT) if name in MEASURED else run_arm(ARMS[name], params, ROOT)
    except Exception as error:
        if not explains_itself(error):
            raise
        print(f"evidence, {name}: {explanation(error)}", file=sys.stderr)
        return 1
    return 0


def _start(name: str) -> subprocess.Popen:
    code = f"import sys; from sparsity_forcing.evidence.__main__ import run_one; sys.exit(run_one({name!r}))"
    return subprocess.Popen([sys.executable, "-c", code])


def _stop(signal_number: int, frame: object) -> None:
    """Asked to stop: leave through every `finally`, so that the processes stop too and MLflow runs end as killed."""
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    app()
