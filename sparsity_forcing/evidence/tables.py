"""The tables of docs/evidence.md: pure functions of the results."""

from __future__ import annotations

import math
from statistics import mean, stdev

from scipy.stats import t as student

from sparsity_forcing.evidence.arms import ANY_BUDGET, ARMS
from sparsity_forcing.evidence.experiment import DENSE
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting.intervals import PairedDifference, agresti_min

SEEDS = {name: (name, f"{name}_seed_1", f"{name}_seed_2") for name in ("default", "longer")}
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
    """Of the headlines, where every seed has run: the ratios, and the mean loss with Student's 95% interval."""
    dense = results["base"]["test"][str(DENSE)]["accuracy"] if "base" in results else math.nan
    lines = []
    for headline, names in SEEDS.items():
        if not all(name in results for name in ("base", *names)):
            lines.append(f"- `{headline}`, {len(names)} seeds: {fmt.NOT_MEASURED}.")
            continue
        at = [results[name]["test"][p] for name in names]
        ratios = [found["visual_token_ratio"] for found in at]
        loss = student_interval([found["accuracy"] - dense for found in at])
        lines.append(
            f"- `{headline}`, {len(names)} seeds: visual tokens kept {', '.join(map(fmt.percent, ratios))} (mean "
            f"{fmt.percent(mean(ratios))}), accuracy against the dense base {fmt.points(loss[0])} "
            f"({fmt.points(loss[1])} … {fmt.points(loss[2])}) points."
        )
    return "\n".join([*lines, "", "All seeds train from one base."])


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


def budgets_table(results: dict[str, dict]) -> str:
    """Visual tokens kept and accuracy of base and policies at every budget they were judged at."""
    names = [name for name in ("base", *ARMS) if name in results and str(ANY_BUDGET[0]) in results[name]["test"]]
    if not names:
        return fmt.NOT_MEASURED
    lines = [f"| p | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for p in sorted(results[names[0]]["test"], key=float):
        at = [results[name]["test"].get(p) for name in names]
        cells = [fmt.percent(found["accuracy"]) + " at " + fmt.percent(found["visual_token_ratio"]) for found in at]
        lines.append(f"| {p} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lengths_table(found: dict) -> str:
    """Base and policy by the length of the prompt."""
    at = {(one["checkpoint"], one["visual_tokens"], one["p"]): one for one in found["lengths"]}
    sizes = sorted({tokens for _, tokens, _ in at})
    (p,) = {p for *_, p in at} - {DENSE}
    lines = [
        f"{found['lengths'][0]['questions']} questions a length, p = {p}.",
        "",
        "| visual tokens | kept by the base | kept by the policy | base: dense, sparse | policy: dense, sparse |",
        "|---|---|---|---|---|",
    ]
    for tokens in sizes:
        kept = [fmt.percent(at[name, tokens, p]["visual_token_ratio"]) for name in ("base", "policy")]
        right = [
            ", ".join(fmt.percent(at[name, tokens, budget]["accuracy"]) for budget in (DENSE, p))
            for name in ("base", "policy")
        ]
        lines.append(f"| {fmt.amount(tokens)} | {' | '.join([*kept, *right])} |")
    return "\n".join(lines)


def cost_text(found: dict) -> str:
    """What a training took, beside what it was."""
    return (
        f"`{found['name']}`: {fmt.amount(found['rollouts'])} rollouts of {fmt.amount(found['prompts'])} prompts, "
        f"{fmt.amount(found['prompt_tokens'])} prompt tokens (a prompt's counted for each of its rollouts, though they "
        f"share one pass) and {fmt.amount(found['new_tokens'])} sampled tokens, {found['seconds'] / 3600:.2f} hours on "
        f"{found['hardware']}, validation included."
    )
