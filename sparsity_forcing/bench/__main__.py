"""`python -m sparsity_forcing.bench cpu|gpu|trl`: measures, checks, writes metrics/bench_*.json.

The file holds every raw sample with its setting and a manifest (commit, machine, versions, threads). The last line
printed is one JSON object with the figures that are quoted.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from sparsity_forcing.bench.compare import BenchError, Case
from sparsity_forcing.bench.operations import decode_case, mass_case
from sparsity_forcing.bench.rollouts import group_case, loop_case, one_case
from sparsity_forcing.bench.training import training_case
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
    _measure(
        output,
        cases,
        lambda found: {
            "decode_4k_speedup": found["decode_4k"].speedup,
            "decode_16k_speedup": found["decode_16k"].speedup,
            "mass_over_dense_attention": 1 / found["mass_4k"].speedup,
            "group_of_8_speedup": found["group_of_8"].speedup,
            "loop_over_generate": found["loop"].speedup,
        },
    )


@app.command()
def gpu(output: Output = Path("metrics/bench_gpu.json"), repetitions: Repetitions = 20) -> None:
    """The GPU set: operations and random-weight Qwen2.5-VL models, needs a CUDA device."""
    if not torch.cuda.is_available():
        typer.echo("bench: there is no CUDA device here; `make bench-cpu` runs the CPU set", err=True)
        raise typer.Exit(2)
    from sparsity_forcing.bench.gpu import gpu_cases, gpu_summary

    _measure(output, gpu_cases(repetitions), gpu_summary)


@app.command()
def trl(output: Output = Path("metrics/bench_trl.json"), rounds: Repetitions = 3) -> None:
    """The trainer beside TRL's GRPOTrainer on the CPU, and a group of 8 rollouts beside one."""
    if importlib.util.find_spec("trl") is None:
        typer.echo("bench: TRL is not installed; `pip install -e '.[dev]'` has it", err=True)
        raise typer.Exit(2)
    cases = {"training": lambda: training_case(rounds), "one": lambda: one_case(16, 16, 5)}
    _measure(output, cases, _trl_summary)


def _trl_summary(found: dict[str, Case]) -> dict[str, float]:
    """Ours over the fastest of TRL's ways in speed, over the leanest in memory."""
    peak = found["training"].notes["peak_memory_bytes"]
    return {
        "completions_per_second_ratio": found["training"].speedup,
        "peak_memory_ratio": peak["ours"] / min(of for engine, of in peak.items() if engine != "ours"),
        "group_of_8_over_one": found["one"].notes["group_over_one"],
    }


def _measure(
    output: Path, cases: dict[str, Callable[[], Case]], summarise: Callable[[dict[str, Case]], dict[str, float]]
) -> None:
    """Measures, writes and prints. What fails is named and gives no figure; the others are written all the same."""
    console = Console(stderr=True)
    found, failed = {}, {}
    for key, measure in cases.items():
        try:
            case = found[key] = measure()
        except (BenchError, torch.OutOfMemoryError) as error:
            failed[key] = str(error)
            console.print(f"{key}: {error}; no figure is given")
            continue
        console.print(f"{case.name}: {case.subject} is {case.speedup:.2f} times as fast as {case.baseline}")
    summary = {} if failed else summarise(found)
    git = git_state(Path("."))
    manifest = {
        "commit": git.commit,
        "dirty": git.dirty,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    written = {"manifest": manifest, "summary": summary, "cases": {key: case.as_json() for key, case in found.items()}}
    write_json_atomic(output, written | {"failed": failed})
    if failed:
        typer.echo(f"bench: no figure for {', '.join(failed)}; {output} has the others, and why", err=True)
    print(json.dumps({name: round(value, 3) for name, value in summary.items()}))
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
