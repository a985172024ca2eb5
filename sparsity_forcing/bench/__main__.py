"""`python -m sparsity_forcing.bench cpu|gpu|trl`: measures, checks, writes metrics/bench_*.json.

The file holds every raw sample with its setting and a manifest (commit, machine, versions, threads). The last line
printed is one JSON object with the figures that are quoted.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from sparsity_forcing.bench.compare import BenchError, Case
from sparsity_forcing.bench.operations import decode_case, mass_case
from sparsity_forcing.bench.rollouts import group_case, loop_case
from sparsity_forcing.bench.training import one_case, training_case
from sparsity_forcing.files import write_json_atomic
from sparsity_forcing.lineage import git_state, hardware, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Output = Annotated[Path, typer.Option(help="Where the JSON goes.")]
Repetitions = Annotated[int, typer.Option(min=1, help="Samples of every arm.")]


@app.command()
def cpu(output: Output = Path("metrics/bench_cpu.json"), repetitions: Repetitions = 7) -> None:
    """The CPU set: decode attention, exact mass, a group of 8, the decode loop."""
    cases: dict[str, Callable[[], Case]] = {
        "decode_4k": lambda: decode_case(4096, 1, 0.25, "cpu", torch.float32, repetitions),
        "decode_16k": lambda: decode_case(16384, 1, 0.25, "cpu", torch.float32, repetitions),
        "mass_4k": lambda: mass_case(4096, 4096, "cpu", torch.float32, repetitions),
        "group_of_8": lambda: group_case(32, 8, repetitions),
        "loop": lambda: loop_case(8, 4, 8, repetitions),
    }
    found = _run(cases)
    summary = {
        "decode_4k_speedup": found["decode_4k"].speedup,
        "decode_16k_speedup": found["decode_16k"].speedup,
        "mass_over_dense_attention": 1 / found["mass_4k"].speedup,
        "group_of_8_speedup": found["group_of_8"].speedup,
        "loop_over_generate": found["loop"].speedup,
    }
    _write(output, found, summary)


@app.command()
def gpu(output: Output = Path("metrics/bench_gpu.json"), repetitions: Repetitions = 20) -> None:
    """The GPU set: operations and random-weight Qwen2.5-VL models, needs a CUDA device."""
    if not torch.cuda.is_available():
        typer.echo("bench: there is no CUDA device here; `make bench-cpu` runs the CPU set", err=True)
        raise typer.Exit(2)
    from sparsity_forcing.bench.gpu import gpu_cases, gpu_summary

    found = _run(gpu_cases(repetitions))
    _write(output, found, gpu_summary(found))


@app.command()
def trl(output: Output = Path("metrics/bench_trl.json"), rounds: Repetitions = 3) -> None:
    """The trainer beside TRL's GRPOTrainer on the CPU, and a group of 8 rollouts beside one."""
    if importlib.util.find_spec("trl") is None:
        typer.echo("bench: TRL is not installed; `pip install -e '.[dev]'` has it", err=True)
        raise typer.Exit(2)
    found = _run({"training": lambda: training_case(rounds), "one": lambda: one_case(5)})
    peak = found["training"].notes["peak_memory_bytes"]
    summary = {
        "completions_per_second_ratio": found["training"].speedup,
        "peak_memory_ratio": peak["ours"] / peak["trl"],
        "group_of_8_over_one": found["one"].speedup,
    }
    _write(output, found, summary)


def _run(cases: dict[str, Callable[[], Case]]) -> dict[str, Case]:
    console = Console(stderr=True)
    found = {}
    for key, measure in cases.items():
        case = found[key] = measure()
        console.print(f"{case.name}: {case.subject} is {case.speedup:.2f} times as fast as {case.baseline}")
    return found


def _write(output: Path, found: dict[str, Case], summary: dict) -> None:
    git = git_state(Path("."))
    manifest = {
        "commit": git.commit,
        "dirty": git.dirty,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    cases = {key: case.as_json() for key, case in found.items()}
    write_json_atomic(output, {"manifest": manifest, "summary": summary, "cases": cases})
    print(json.dumps({name: round(value, 3) for name, value in summary.items()}))


if __name__ == "__main__":
    try:
        app()
    except BenchError as error:
        print(f"bench: {error}; no figure is given", file=sys.stderr)
        sys.exit(1)
