"""Writes the README's figures from the metrics: `make readme`. So the README says what the committed runs measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from sparsity_forcing.evaluation.table import AVERAGE, BenchmarkTable, load_table
from sparsity_forcing.files import write_text_atomic
from sparsity_forcing.methods import Full
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting.content import POLICY_ARM, perspective_text

HEADER = "| model | attention | budget p | accuracy (95% interval) | visual tokens kept | all tokens kept |"


class ReadmeError(ValueError):
    """README.md has no place for the figures."""


def results(table: BenchmarkTable, report: dict, train: dict) -> str:
    """The results as Markdown: a sentence with its setting, and one line per method and checkpoint."""
    headline, rows = report["headline"], table.averages()
    benchmarks = sorted({row.benchmark for row in table.rows} - {AVERAGE})
    lines = [
        f"At p = {headline['p']:g} the trained model keeps {fmt.percent(headline['visual_token_ratio'])} of the "
        f"visual tokens (before: {fmt.percent(headline['visual_token_ratio_before'])}) and answers "
        f"{fmt.percent(headline['accuracy'])} of {fmt.amount(headline['questions'])} held-out questions; the dense "
        f"base answers {fmt.percent(headline['dense_accuracy'])}.",
        "",
        perspective_text(table),
        "",
        HEADER,
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense = row.method == Full.name
        lines.append(
            f"| {row.checkpoint} | {'dense' if dense else row.method} | {'–' if dense else format(row.p, 'g')} "
            f"| {fmt.percent(row.accuracy)} ({fmt.interval(row.accuracy_low, row.accuracy_high)}) "
            f"| {fmt.percent(row.visual_token_ratio)} | {fmt.percent(row.token_ratio)} |"
        )
    lines += [
        "",
        decode_text(report["efficiency"].values()),
        "",
        f"Questions pooled over {', '.join(f'`{name}`' for name in benchmarks)}; one training seed, "
        f"{train['steps']} steps of {train['rollouts'] // train['steps']} rollouts in "
        f"{fmt.duration(train['seconds'])}. "
        f"Largest difference between rollout and replay log-probabilities: {train['replay_max_difference']:.1e}.",
    ]
    return "\n".join(lines)


def decode_text(lengths: Iterable[dict]) -> str:
    """What a decode step and the cache of the trained model are to the dense one's, by length."""
    said, lengths = [], sorted(lengths, key=lambda length: length["visual_tokens"])
    for length in lengths:
        arm = length["arms"][POLICY_ARM]
        time = arm["decode_ratio"]
        said.append(
            f"at {fmt.amount(length['visual_tokens'])} visual tokens {time['median']:.2f} times the dense one's time "
            f"(quartiles {time['low']:.2f}–{time['high']:.2f}) and {fmt.percent(arm['cache_ratio'], 0)} of its cache, "
            f"the first token {arm['prefill_ratio']['median']:.2f} times"
        )
    together = ", ".join(map(str, sorted({length["batch"] for length in lengths})))
    return (
        f"A decode step of the trained model takes {'; '.join(said)}. Prompts at a time: {together}. A layer's cache "
        "is as wide as that of the prompt which keeps most: of several, the share of bytes is above that of tokens."
    )


def speed(cpu: dict | None, gpu: dict | None, trl: dict | None = None) -> str:
    """The speed table as Markdown: every case of the CPU set, of the GPU set and of the comparison with TRL, with its
    setting and its baseline, and a line for each further arm that it was measured against."""
    lines = ["| what | setting | against | speed-up (range) |", "|---|---|---|---|"]
    sets = ((cpu, "cpu", "everything on a CPU"), (gpu, "gpu", "everything on a GPU"), (trl, "trl", "a training step"))
    for bench, name, everything in sets:
        if bench is None:
            lines.append(f"| {everything} | – | – | {fmt.NOT_MEASURED}; `make bench-{name}` measures it |")
            continue
        for case in bench["cases"].values():
            cells = f"{case['name']} | {_setting(case['setting'])}"
            for arm in [case["baseline"], *(arm for arm in case["speedups"] if arm != case["baseline"])]:
                ratio = case["speedups"][arm]
                low, high = ratio["range"]
                lines.append(f"| {cells} | {arm} | {ratio['median']:.2f} × ({low:.2f}–{high:.2f}) |")
                cells = "〃 | 〃"
    lines += ["", *(_made_on(name, bench["manifest"]) for bench, name, _ in sets if bench is not None)]
    if peak := trl and trl["cases"].get("training", {}).get("notes", {}).get("peak_memory_bytes"):
        of_engines = "; ".join(f"{engine} {of / 1e9:.2f} GB" for engine, of in peak.items())
        lines.append(f"Peak memory of a training process: {of_engines}.")
    return "\n".join(lines)


def _made_on(name: str, manifest: dict) -> str:
    versions = manifest["versions"]
    used = [f"{package} {versions[package]}" for package in ("torch", "trl") if package in versions]
    return f"`make bench-{name}` ran on {manifest['hardware']}, {', '.join(used)}."


def _setting(setting: dict) -> str:
    shown = (
        "token_ratio",
        "heads",
        "kv_heads",
        "dim",
        "prompts",
        "answers",
        "rollouts",
        "new_tokens",
        "layers",
        "dtype",
    )
    return ", ".join(f"{key.replace('_', ' ')} {setting[key]}" for key in shown if key in setting)


def with_block(page: str, name: str, block: str, file: str = "README.md") -> str:
    """``page`` with ``block`` between the markers ``<!-- name -->`` and ``<!-- /name -->``; ``file``: its name.

    Raises:
        ReadmeError: a marker is missing.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ReadmeError(f"{file} needs the lines {first} and {last} where the figures go")
    return f"{before}{first}\n{block}\n{last}{after}"


def main(root: Path = Path(".")) -> None:
    read = lambda name: json.loads((root / f"metrics/{name}.json").read_text(encoding="utf-8"))  # noqa: E731
    path = root / "README.md"
    block = results(load_table(root / "metrics/evaluate.json"), read("report"), read("train"))
    readme = with_block(path.read_text(encoding="utf-8"), "results", block)
    names = ("bench_cpu", "bench_gpu", "bench_trl")
    benches = [read(name) if (root / f"metrics/{name}.json").exists() else None for name in names]
    write_text_atomic(path, with_block(readme, "speed", speed(*benches)))


if __name__ == "__main__":
    main()
