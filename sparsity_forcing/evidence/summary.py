"""What the experiments say together: a table, a figure and one line of JSON."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import t as student

from sparsity_forcing.evidence.arms import ARMS
from sparsity_forcing.evidence.experiment import DENSE, current, made_by_arm, made_by_base
from sparsity_forcing.evidence.gradient import made_by_gradient
from sparsity_forcing.files import write_text_atomic
from sparsity_forcing.params import Params, ParamsError
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting.drawing import Drawing, new_figure
from sparsity_forcing.reporting.intervals import PairedDifference, agresti_min
from sparsity_forcing.reporting.readme import with_block

PAGE = Path("docs/evidence.md")
SEEDS = ("default", "default_seed_1", "default_seed_2")
HEADER = (
    "| experiment | visual tokens kept | accuracy | points against the dense base | policy of step "
    "| at the last step, on validation: kept, accuracy |"
)
GRADIENTS = {
    "theorem": "1 − τ alone, through token log-probabilities",
    "efficiency_tokens": "efficiency as the literal objective has it (C, group's deviation), through the same",
    "correct_tokens": "correctness as the literal objective has it, through the same",
    "efficiency_selection": "efficiency, through the sampled selection",
    "correct_selection": "correctness, through the sampled selection",
}


def read_results(params: Params, root: Path) -> dict[str, dict]:
    """Results by name, of the base and of the arms, in the arms' order: those that are current."""
    made_by = {"base": made_by_base(params, root)}
    for name, arm in ARMS.items():
        with suppress(ParamsError):  # an experiment that does not go with these parameters has not run with them
            made_by[name] = made_by_arm(arm, params, root)
    found = {name: current(name, of, root) for name, of in made_by.items()}
    return {name: result for name, result in found.items() if result is not None}


def write_summary(params: Params, root: Path) -> dict:
    """Writes the tables into docs/evidence.md and the figure plots/evidence.png; returns the figures that are quoted.

    What has not run, or not with these parameters, this code, base and data, is called not measured.
    """
    results, p = read_results(params, root), str(params.sparsity.p)
    figure = curves(results).save_png(root / "plots")
    gradient = current("gradient", made_by_gradient(params, root), root)
    blocks = {
        "arms": f"{arms_table(results, p)}\n\n![Visual tokens kept during training](../plots/{figure.name})",
        "seeds": seeds_text(results, p),
        "gradient": fmt.NOT_MEASURED if gradient is None else gradient_table(gradient),
    }
    page = (root / PAGE).read_text(encoding="utf-8")
    for name, block in blocks.items():
        page = with_block(page, name, block, PAGE.as_posix())
    write_text_atomic(root / PAGE, page)
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
    """Every experiment at the deployed budget, beside the untrained base: its policy on the test questions, and where
    its training ended on the validation questions."""
    if "base" not in results:
        return fmt.NOT_MEASURED
    base = results["base"]["test"]
    dense = base[str(DENSE)]
    lines = [
        f"At p = {p}, {fmt.amount(dense['questions'])} held-out questions. The dense base answers "
        f"{fmt.percent(dense['accuracy'])}; differences are paired, with 95% intervals.",
        "",
        HEADER,
        "|---|---|---|---|---|---|",
        f"| the base, untrained | {_at(base[p], dense)} | – | – |",
    ]
    for name, arm in ARMS.items():
        if name in results:
            found = results[name]
            step = str(found["policy_step"]) + ("" if found["within_guard"] else ", none was within the guard")
            end = found["curve"][-1]
            end = f"{fmt.percent(end['visual_token_ratio'])}, {fmt.percent(end['accuracy'])}"
            lines.append(f"| `{name}`: {arm.question} | {_at(found['test'][p], dense)} | {step} | {end} |")
        else:
            lines.append(f"| `{name}`: {arm.question} | {fmt.NOT_MEASURED} | | | | |")
    return "\n".join(lines)


def _at(one: dict, dense: dict) -> str:
    """The cells that the base and the arms share."""
    found = paired(one["scores"], dense["scores"])
    difference = f"{fmt.points(found.difference)} ({fmt.points(found.low)} … {fmt.points(found.high)})"
    return f"{fmt.percent(one['visual_token_ratio'])} | {fmt.percent(one['accuracy'])} | {difference}"


def paired(first: str, second: str) -> PairedDifference:
    """First minus second of the results of the same questions, a character per question, "1" where it is right."""
    pairs = list(zip(first, second, strict=True))
    return agresti_min(pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs))


def seeds_text(results: dict[str, dict], p: str) -> str:
    """Mean over the seeds with Student's 95% interval, where every seed has run."""
    if not all(name in results for name in ("base", *SEEDS)):
        return f"Seeds: {fmt.NOT_MEASURED}."
    dense = results["base"]["test"][str(DENSE)]["accuracy"]
    at = [results[name]["test"][p] for name in SEEDS]
    ratio = student_interval([found["visual_token_ratio"] for found in at])
    loss = student_interval([found["accuracy"] - dense for found in at])
    return (
        f"Over {len(SEEDS)} seeds: visual tokens kept {fmt.percent(ratio[0])} (95% interval "
        f"{fmt.interval(*ratio[1:])}), accuracy against the dense base {fmt.points(loss[0])} "
        f"({fmt.points(loss[1])} … {fmt.points(loss[2])}) points. All seeds train from one base."
    )


def student_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and its interval by Student's t."""
    centre = mean(values)
    half = student.ppf((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def gradient_table(found: dict) -> str:
    """Signal and noise of the parts of the gradient."""
    lines = [
        f"{found['draws']} draws of the rollouts of {found['prompts']} prompts at the base's weights.",
        "",
        "| part of the gradient | signal | its error | signal / error | signal / noise |",
        "|---|---|---|---|---|",
    ]
    for name, text in GRADIENTS.items():
        part = found["parts"][name]
        ratio = "–" if part["z"] is None else f"{part['z']:.1f}"
        against = f"{part['signal'] / part['noise']:.3f}" if part["noise"] else "–"
        lines.append(f"| {text} | {part['signal']:.2e} | {part['error']:.1e} | {ratio} | {against} |")
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
        if trained:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
        return figure

    return Drawing(
        "evidence",
        draw,
        "Visual tokens kept at the deployed budget over the training of every experiment.",
        "Visual token ratio against training steps for every experiment.",
    )
