"""What the experiments found, as blocks of a report: pure functions of the results.

``why_not``: why there is no result with these parameters; without it `make evidence` would make it.
"""

from __future__ import annotations

import math
from statistics import mean, stdev

from scipy.stats import t as student

from sparsity_forcing.evaluation.intervals import wilson_interval
from sparsity_forcing.evidence.arms import ANY_BUDGET, ARMS, SEEDS
from sparsity_forcing.evidence.experiment import DENSE
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting.document import Column, Missing, Table, Text
from sparsity_forcing.reporting.intervals import PairedDifference, agresti_min

NOT_RUN = "`make evidence` runs what is missing"
GRADIENTS = {
    "theorem": "1 − τ alone, through token log-probabilities",
    "efficiency_tokens": "efficiency as the literal objective has it (C, group's deviation), through the same",
    "correct_tokens": "correctness as the literal objective has it, through the same",
    "efficiency_selection": "efficiency, through the sampled selection",
    "correct_selection": "correctness, through the sampled selection",
}
QUOTED = {
    "default": "the default",
    "default_seed_1": "with a second seed",
    "default_seed_2": "with a third",
    "default_seed_3": "with a fourth",
    "literal": "the literal objective",
    "no_efficiency": "no efficiency reward",
    "shuffled": "a cost dealt out at random",
    "undistorted": "training questions about the scans as they are",
    "sft": "supervised fine-tuning",
    "sft_relaxed_ratio": "fine-tuning with a relaxed token ratio in its loss",
    "dpo": "DPO",
}
WAYS = {
    "dense": "all tokens",
    "dense_cache": "its own selection, from the dense visual prefix that was kept",
    "pruned_cache": "what the first question kept",
}


def arms_table(results: dict[str, dict], p: str) -> Table | Missing:
    """Every experiment at the deployed budget, beside the base: its policy on the test questions, and where
    its training began and ended on the validation questions."""
    if "base" not in results:
        return Missing("Experiments", NOT_RUN)
    base = results["base"]["test"]
    dense = base[str(DENSE)]
    rows = [["base", "what every training starts from", *_at(base[p], dense), "–", "–", "–"]]
    for name, arm in ARMS.items():
        if name not in results:
            rows.append([name, arm.question, fmt.NOT_MEASURED, *[""] * 5])
            continue
        found = results[name]
        step = str(found["policy_step"]) + ("" if found["within_guard"] else ", none was within the guard")
        start, end = found["curve"][0], found["curve"][-1]
        course = [f"{fmt.percent(start[key])} → {fmt.percent(end[key])}" for key in ("visual_token_ratio", "accuracy")]
        rows.append([name, arm.question, *_at(found["test"][p], dense), step, *course])
    caption = (
        f"At p = {p}, {fmt.amount(dense['questions'])} held-out questions. The dense base answers "
        f"{fmt.percent(dense['accuracy'])}; differences to it are paired, with 95% intervals"
    )
    columns = [
        *(Column("Experiment", numeric=False), Column("What it is", numeric=False)),
        *(Column("Visual tokens kept"), Column("Accuracy"), Column("Points"), Column("Policy of step")),
        *(Column(label, group="validation, first to last step") for label in ("kept", "accuracy")),
    ]
    headlines = frozenset(place for place, row in enumerate(rows) if row[0] in SEEDS["default"])
    return Table(caption, columns, rows, highlight=headlines)


def headline_text(results: dict[str, dict], turns: dict | None, p: str) -> Text | Missing:
    """Base, seeds of the default, the experiments `QUOTED` and the second question in a few sentences; what has not run
    is named."""
    if "base" not in results:
        return Missing("The experiments", NOT_RUN)
    base = results["base"]["test"]
    dense, sparse = base[str(DENSE)], base[p]

    def said(name: str) -> str:
        found = results[name]["test"][p]
        guard = "" if results[name]["within_guard"] else ", no step within the guard"
        loss = fmt.points(found["accuracy"] - dense["accuracy"])
        return f"{QUOTED[name]} {fmt.percent(found['visual_token_ratio'])} ({loss}{guard})"

    second = "a second question on the same image"
    missing = [what for name, what in QUOTED.items() if name not in results] + ([second] if turns is None else [])
    sentences = [
        f"Of {fmt.amount(dense['questions'])} held-out questions the dense base answers "
        f"{fmt.percent(dense['accuracy'])}; at p = {p} it keeps {fmt.percent(sparse['visual_token_ratio'])} of the "
        f"visual tokens and answers {fmt.percent(sparse['accuracy'])}.",
        "Visual tokens kept after training, and points of accuracy against the dense base: "
        + ("; ".join(said(name) for name in QUOTED if name in results) or "nothing yet")
        + ".",
    ]
    if turns is not None:
        ways = turns["checkpoints"]["policy"]
        lost = {way: fmt.points(paired(ways[way]["scores"], ways["dense"]["scores"]).difference) for way in ways}
        sentences.append(
            f"{second.capitalize()} changes the policy's accuracy by {lost['pruned_cache']} points where only what the "
            f"first one kept is left, by {lost['dense_cache']} where it selects anew from the dense visual prefix."
        )
    if missing:
        sentences.append(f"Not measured, among others: {'; '.join(missing)}.")
    return Text(" ".join(sentences))


def _at(one: dict, dense: dict) -> list[str]:
    """Visual tokens kept, accuracy, and points against ``dense`` on the same questions."""
    return [fmt.percent(one["visual_token_ratio"]), fmt.percent(one["accuracy"]), _points(one, dense)]


def _points(one: dict, dense: dict) -> str:
    found = paired(one["scores"], dense["scores"])
    return f"{fmt.points(found.difference)} ({fmt.points(found.low)} … {fmt.points(found.high)})"


def paired(first: str, second: str) -> PairedDifference:
    """First minus second of the results of the same questions, a character per question, "1" where it is right."""
    pairs = list(zip(first, second, strict=True))
    return agresti_min(pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs))


def seeds_table(results: dict[str, dict], p: str) -> Table | Missing:
    """Of the headlines, where every seed has run: the ratios and the loss, their means with Student's 95% intervals."""
    if "base" not in results:
        return Missing("The headline across seeds", NOT_RUN)
    dense = results["base"]["test"][str(DENSE)]["accuracy"]
    rows = []
    for headline, names in SEEDS.items():
        if not all(name in results for name in names):
            rows.append([headline, str(len(names)), fmt.NOT_MEASURED, *[""] * 3])
            continue
        at = [results[name]["test"][p] for name in names]
        ratios = [found["visual_token_ratio"] for found in at]
        loss = student_interval([found["accuracy"] - dense for found in at])
        difference = f"{fmt.points(loss[0], 2)} ({fmt.points(loss[1], 2)} … {fmt.points(loss[2], 2)})"
        accuracies = ", ".join(fmt.percent(found["accuracy"]) for found in at)
        shown = ", ".join(map(fmt.percent, ratios))
        kept = student_interval(ratios)
        kept_mean = f"{fmt.percent(kept[0])} ({fmt.percent(max(0.0, kept[1]))} … {fmt.percent(min(1.0, kept[2]))})"
        rows.append([headline, str(len(names)), shown, kept_mean, accuracies, difference])
    caption = (
        f"At p = {p}, all seeds from one base, which answers {fmt.percent(dense)} dense. Means are over the "
        "seeds, with Student's 95% interval: of the training seed alone, for this base and these questions"
    )
    columns = [
        *(Column("Experiment", numeric=False), Column("Seeds"), Column("Visual tokens kept"), Column("Mean kept")),
        *(Column("Accuracy"), Column("Points against the dense base")),
    ]
    return Table(caption, columns, rows)


def student_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and its interval by Student's t."""
    centre = mean(values)
    half = student.ppf((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return centre, centre - half, centre + half


def gradient_table(found: dict | None, why_not: str | None = None) -> Table | Missing:
    """Signal and noise of the parts of the gradient."""
    if found is None:
        return Missing("Signal and noise of the gradient", why_not or NOT_RUN)
    rows = []
    for name, text in GRADIENTS.items():
        part = found["parts"][name]
        ratio = "–" if part["z"] is None else f"{part['z']:.1f}"
        against = f"{part['signal'] / part['noise']:.3f}" if part["noise"] else "–"
        rows.append([text, f"{part['signal']:.2e}", f"{part['error']:.1e}", ratio, against])
    columns = [
        *(Column("Part of the gradient", numeric=False), Column("Signal"), Column("Its error")),
        *(Column("Signal / error"), Column("Signal / noise")),
    ]
    caption = f"{found['draws']} draws of the rollouts of {found['prompts']} prompts at the base's weights"
    return Table(caption, columns, rows)


def budgets_table(results: dict[str, dict]) -> Table | Missing:
    """Visual tokens kept and accuracy of base and policies at every budget they were judged at, and the policies'
    points against the base at the same one."""
    budgets = {str(p) for p in ANY_BUDGET}
    names = [name for name in ("base", *ARMS) if name in results and budgets <= results[name]["test"].keys()]
    if "base" not in names:
        return Missing("Accuracy at any budget", NOT_RUN)
    rows = []
    for p in sorted(results[names[0]]["test"], key=float):
        at = [results[name]["test"].get(p) for name in names]
        cells = [fmt.percent(found["accuracy"]) + " at " + fmt.percent(found["visual_token_ratio"]) for found in at]
        rows.append([p, *cells, *(_points(found, at[0]) for found in at[1:])])
    columns = [Column("p"), *(Column(name) for name in names)]
    columns += [Column(name, group="points against the base at the same p") for name in names[1:]]
    caption = "Accuracy at visual tokens kept; differences on the same questions, with 95% intervals"
    return Table(caption, columns, rows)


def lengths_table(found: dict | None, why_not: str | None = None) -> Table | Missing:
    """Base and policy by the length of the prompt."""
    if found is None:
        return Missing("Longer prompts", why_not or NOT_RUN)
    at = {(one["checkpoint"], one["visual_tokens"], one["p"]): one for one in found["lengths"]}
    sizes = sorted({tokens for _, tokens, _ in at})
    p = found["p"]
    rows = []
    for tokens in sizes:
        ratios = ("visual_token_ratio", "token_ratio")
        kept = [fmt.percent(at[name, tokens, p][ratio]) for name in ("base", "policy") for ratio in ratios]
        right = [_with_interval(at[name, tokens, budget]) for name in ("base", "policy") for budget in (DENSE, p)]
        rows.append([fmt.amount(tokens), fmt.amount(at["base", tokens, p]["questions"]), *kept, *right])
    columns = [
        Column("Visual tokens"),
        Column("Questions"),
        *(Column(kind, group=f"kept by the {name}") for name in ("base", "policy") for kind in ("visual", "all")),
        *(Column(kind, group=f"accuracy of the {name}") for name in ("base", "policy") for kind in ("dense", "sparse")),
    ]
    return Table(f"Sparse at p = {p:g}; accuracies with 95% intervals", columns, rows)


def _with_interval(found: dict) -> str:
    accuracy = found["accuracy"]
    return f"{fmt.percent(accuracy)} ({fmt.interval(*wilson_interval(accuracy, found['questions']))})"


def turns_table(found: dict | None, why_not: str | None = None) -> Table | Missing:
    """The second question by what it is answered over."""
    if found is None:
        return Missing("A second question on the same image", why_not or NOT_RUN)
    rows = [
        [
            *(checkpoint, text, fmt.percent(ways[way]["visual_token_ratio"]), fmt.percent(ways[way]["accuracy"])),
            "–" if way == "dense" else _points(ways[way], ways["dense"]),
        ]
        for checkpoint, ways in found["checkpoints"].items()
        for way, text in WAYS.items()
    ]
    caption = (
        f"{fmt.amount(found['questions'])} second questions, p = {found['p']:g}; points against the same model's "
        "answers over all tokens are paired, with 95% intervals"
    )
    columns = [
        *(Column("Checkpoint", numeric=False), Column("The second question is answered over", numeric=False)),
        *(Column("Visual tokens"), Column("Accuracy"), Column("Points")),
    ]
    return Table(caption, columns, rows)


def cost_text(found: dict | None) -> Text | Missing:
    """What a training took, beside what it was."""
    if found is None:
        return Missing("The cost of a training", NOT_RUN)
    return Text(
        f"Cost of {found['name']}: {fmt.amount(found['rollouts'])} rollouts of {fmt.amount(found['prompts'])} prompts, "
        f"{fmt.amount(found['prompt_tokens'])} prompt tokens (a prompt's counted for each of its rollouts, though they "
        f"share one pass) and {fmt.amount(found['new_tokens'])} sampled tokens, {found['seconds'] / 3600:.2f} hours on "
        f"{found['hardware']}, validation included."
    )
