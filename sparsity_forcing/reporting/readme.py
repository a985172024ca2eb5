"""Writes the README's results from the metrics: `make readme`. So the README says what the committed run measured."""

from __future__ import annotations

import json
from pathlib import Path

from sparsity_forcing.evaluation.table import AVERAGE, BenchmarkTable, load_table
from sparsity_forcing.files import write_text_atomic
from sparsity_forcing.methods import Full
from sparsity_forcing.reporting import formatting as fmt

BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEADER = "| model | attention | budget p | accuracy (95% interval) | visual tokens kept | all tokens kept |"


class ReadmeError(ValueError):
    """README.md has no place for the results."""


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
        f"Questions pooled over {', '.join(f'`{name}`' for name in benchmarks)}; one training seed, "
        f"{train['steps']} steps of {train['rollouts'] // train['steps']} rollouts in "
        f"{fmt.duration(train['seconds'])}. "
        f"Largest difference between rollout and replay log-probabilities: {train['replay_max_difference']:.1e}.",
    ]
    return "\n".join(lines)


def with_results(readme: str, block: str) -> str:
    """``readme`` with ``block`` between its two markers.

    Raises:
        ReadmeError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReadmeError(f"README.md needs the lines {BEGIN} and {END} where the results go")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(root: Path = Path(".")) -> None:
    report, train = (json.loads((root / f"metrics/{name}.json").read_text()) for name in ("report", "train"))
    path = root / "README.md"
    block = results(load_table(root / "metrics/evaluate.json"), report, train)
    write_text_atomic(path, with_results(path.read_text(encoding="utf-8"), block))


if __name__ == "__main__":
    main()
