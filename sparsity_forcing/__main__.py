"""`python -m sparsity_forcing STAGE`: runs one stage here and now.

dvc.yaml runs this command, and the Prefect tasks run it through DVC, so all ways in do the same.
Exit codes: 0 done, 1 failed, 2 what was given is wrong (trying again cannot help), 143 asked to stop.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sparsity_forcing.lineage import processor_field
from sparsity_forcing.params import Params, load_params
from sparsity_forcing.places import require_places
from sparsity_forcing.stages import STAGES

Stage = Enum("Stage", {name: name for name in STAGES}, type=str)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)  # plain tracebacks: they go into logs


@app.command()
def main(
    stage: Annotated[Stage, typer.Argument(help="The step to run.")],
    root: Annotated[Path, typer.Option(help="The workspace: params.yaml and all inputs and outputs.")] = Path("."),
) -> None:
    """Runs one stage of the pipeline with the parameters in params.yaml."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        params = load_params(root / "params.yaml")
        for told in require_places(params, root, stage.value):
            typer.echo(f"{stage.value}: {told}", err=True)
        set_environment(params, root)
        importlib.import_module(f"sparsity_forcing.stages.{stage.value}").run(params, root)
    except Exception as error:
        if not explains_itself(error):
            raise
        typer.echo(f"{stage.value}: {explanation(error)}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError | FileNotFoundError) else 1) from None


def common_rounding() -> dict[str, str]:
    """Variables for torch: no wider instructions than AVX2 where there are these, as wider ones round otherwise."""
    instructions = set((processor_field("flags") or "").split())
    if not {"avx2", "fma"} <= instructions:  # torch does not ask whether they are there
        return {}
    return {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}


def set_environment(params: Params, root: Path) -> None:
    """Defaults that must be the same whoever starts the stage; what the caller has set stays.

    One OpenMP thread: the same sums in the same order on every machine, and two threads on a busy two-core machine
    were four times slower. The model that is trained from scratch is the same one on every machine (`common_rounding`).
    The model hub is asked only when the model is on it.
    """
    defaults = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(Path.home() / ".cache" / "huggingface"),  # some lmms-eval tasks fail without it
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if params.model.name == "scratch" or (root / params.model.name).is_dir():
        defaults |= {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
    if params.model.name == "scratch":
        defaults |= common_rounding()
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def explains_itself(error: Exception) -> bool:
    """Errors this package raises on purpose, and a failed write of an output (a full disk), need no traceback.

    Those that derive from ValueError, and a missing file, say that what was given is wrong.
    """
    failed_write = isinstance(error, OSError) and hasattr(error, "__notes__")  # `files` names the output in a note
    return failed_write or type(error).__module__.startswith("sparsity_forcing.")


def explanation(error: Exception) -> str:
    """An error in words, with what its notes add: the output that could not be written, say."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _stop(signal_number: int, frame: object) -> None:
    """Asked to stop: leave through every `finally`, so that temporary files go and MLflow runs end as killed."""
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    app()
