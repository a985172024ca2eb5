"""What the experiments say together: a table, a figure and one line of JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import t as student

from sparsity_forcing.evidence.arms import ARMS
from sparsity_forcing.evidence.experiment import DENSE, RESULTS
from sparsity_forcing.evidence.gradient import RESULT as GRADIENT
from sparsity_forcing.files import write_text_atomic
from sparsity_forcing.params import Params
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting.drawing import Drawing, new_figure
from sparsity_forcing.reporting.intervals import PairedDifference, agresti_min
from sparsity_forcing.reporting.readme import with_block

PAGE = Path("docs/evidence.md")
SEEDS = ("default", "default_seed_1", "default_seed_2")
HEADER = "| experiment | visual tokens kept | accuracy | against the dense base | policy of step |"
GRADIENTS = {
    "correct_tokens": "correctness, through token log-probabilities",
    "efficiency_tokens": "efficiency, through token log-probabilities",
    "efficiency_selection": "the joint reward, through the sampled selection",
}


def read_results(root: Path) -> dict[str, dict]:
    """Results by name, of the base and of the arms that have run, in the arms' order."""
    paths = {name: root / RESULTS / f"{name}.json" for name in ("base", *ARMS)}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def write_summary(params: Params, root: Path) -> dict:
    """Writes the tables into docs/evidence.md and plots/evidence.png; returns the figures that are quoted."""
    results = read_results(root)
    p = str(params.sparsity.p)
    page = (root / PAGE).read_text(encoding="utf-8")
    page = with_block(page, "arms", arms_table(results, p))
    page = with_block(page, "seeds", seeds_text(results, p))
    if (root / GRADIENT).exists():
        page = with_block(page, "gradient", gradient_table(json.loads((root / GRADIENT).read_text(encoding="utf-8"))))
    write_text_atomic(root / PAGE, page)
    curves(results).save_png(root / "plots")
    return quoted(results, p)


def quoted(results: dict[str, dict], p: str) -> dict[str, float | None]:
    """Visual token ratios and accuracies at the deployed budget, before and after; None for what has not run."""

    def value(name: str, budget: str, key: str) -> float | None:
        return results[name]["test"][budget][key] if name in results else None

    ratio = "visual_token_ratio"
    return {
        "literal_tau_start": value("base", p, ratio),
        "literal_tau_end": value("literal", p, ratio),
        "tau_start": value("base", p, ratio),
        "tau_end": value("default", p, ratio),
        "accuracy_dense": value("base", str(DENSE), "accuracy"),
        "accuracy_end": value("default", p, "accuracy"),
    }


def arms_table(results: dict[str, dict], p: str) -> str:
    """Every experiment at the deployed budget, beside the untrained base."""
    base = results["base"]["test"]
    questions, dense = base[p]["questions"], base[str(DENSE)]
    lines = [
        f"At p = {p}, {fmt.amount(questions)} held-out questions. The dense base answers "
        f"{fmt.percent(dense['accuracy'])}; differences are paired, with 95% intervals.",
        "",
        HEADER,
        "|---|---|---|---|---|",
        f"| the base, untrained | {fmt.percent(base[p]['visual_token_ratio'])} | {fmt.percent(base[p]['accuracy'])} "
        f"| {_difference(base[p], dense)} | – |",
    ]
    for name, arm in ARMS.items():
        if name not in results:
            lines.append(f"| `{name}`: {arm.question} | {fmt.NOT_MEASURED} | | | |")
            continue
        found = results[name]
        at = found["test"][p]
        step = f"{found['policy_step']}" + ("" if found["within_guard"] else " (the last: none was within the guard)")
        lines.append(
            f"| `{name}`: {arm.question} | {fmt.percent(at['visual_token_ratio'])} | {fmt.percent(at['accuracy'])} "
            f"| {_difference(at, dense)} | {step} |"
        )
    return "\n".join(lines)


def _difference(one: dict, other: dict) -> str:
    found = paired(one["scores"], other["scores"])
    return f"{fmt.points(found.difference)} ({fmt.points(found.low)} … {fmt.points(found.high)}) points"


def paired(first: str, second: str) -> PairedDifference:
    """First minus second of the results of the same questions, a character per question, "1" where it is right."""
    pairs = list(zip(first, second, strict=True))
    return agresti_min(pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs))


def seeds_text(results: dict[str, dict], p: str) -> str:
    """Mean over the seeds with Student's 95% interval, where every seed has run."""
    if not all(name in results for name in SEEDS):
        return f"Seeds: {fmt.NOT_MEASURED}."
    dense = results["base"]["test"][str(DENSE)]["accuracy"]
    at = [results[name]["test"][p] for name in SEEDS]
    ratio = student_interval([found["visual_token_ratio"] for found in at])
    loss = student_interval([found["accuracy"] - dense for found in at])
    return (
        f"Over {len(SEEDS)} seeds: visual tokens kept {fmt.percent(ratio[0])} (95% interval "
        f"{fmt.interval(*ratio[1:])}), accuracy against the dense base {fmt.points(loss[0])} "
        f"({fmt.points(loss[1])} … {fmt.points(loss[2])}) points."
    )


def student_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and its interval by Student's t."""
    centre = mean(values)
    half = student.ppf((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def gradient_table(found: dict[str, dict]) -> str:
    """Signal and noise of the parts of the gradient."""
    draws = next(iter(found.values()))["draws"]
    lines = [
        f"{draws} draws of the same prompts at the base's weights.",
        "",
        "| part of the gradient | signal: squared norm of the mean | its error | signal / error | noise: variance |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {text} | {found[name]['signal']:.2e} | {found[name]['error']:.1e} | {found[name]['z']:.1f} "
        f"| {found[name]['noise']:.2e} |"
        for name, text in GRADIENTS.items()
    ]
    return "\n".join(lines)


def curves(results: dict[str, dict]) -> Drawing:
    """Visual token ratio at the deployed budget over the training of every arm."""
    trained = {name: found["curve"] for name, found in results.items() if name != "base"}

    def draw() -> Figure:
        figure = new_figure(7.2, 4.8)
        axes = figure.subplots()
        for place, (name, points) in enumerate(trained.items()):
            steps, ratios = [at["step"] for at in points], [at["visual_token_ratio"] for at in points]
            axes.plot(steps, ratios, color=f"C{place % 10}", linestyle=("-", "--", ":")[place // 10 % 3], label=name)
        axes.set(xlabel="step", ylabel="visual tokens kept on validation", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
        return figure

    return Drawing(
        "evidence",
        draw,
        "Visual tokens kept at the deployed budget over the training of every experiment.",
        "Visual token ratio against training steps for every experiment.",
    )
