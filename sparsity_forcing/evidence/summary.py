"""What the experiments say together: blocks of a page, a figure and one line of JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sparsity_forcing.evidence import gradient, lengths, turns
from sparsity_forcing.evidence.arms import ARMS, SEEDS
from sparsity_forcing.evidence.experiment import (
    DENSE,
    INPUTS,
    MadeBy,
    accept_code,
    current,
    made_by_arm,
    made_by_base,
    stored,
)
from sparsity_forcing.evidence.tables import (
    arms_table,
    budgets_table,
    cost_text,
    gradient_table,
    headline_text,
    lengths_table,
    seeds_table,
    turns_table,
)
from sparsity_forcing.files import write_text_atomic
from sparsity_forcing.params import Params, ParamsError
from sparsity_forcing.reporting.document import Block, Missing, Plot, Section, Text
from sparsity_forcing.reporting.drawing import Drawing, new_figure
from sparsity_forcing.reporting.markdown import render_block
from sparsity_forcing.reporting.readme import with_block

UNTRAINED = {"gradient": gradient, "lengths": lengths, "turns": turns}
PAGE, README = Path("docs/evidence.md"), Path("README.md")
DRAWN = (*SEEDS["default"], "one_budget", "prefill_sparse", "literal", "no_efficiency", "shuffled", "sft", "dpo")


def makers(params: Params, root: Path) -> dict[str, Callable[[], MadeBy]]:
    """What decides the result of each experiment, by name: the base, the arms in their order, what is not trained."""
    of_arms = {name: partial(made_by_arm, arm, params, root) for name, arm in ARMS.items()}
    untrained = {name: partial(module.made_by, params, root) for name, module in UNTRAINED.items()}
    return {"base": partial(made_by_base, params, root), **of_arms, **untrained}


def read_results(params: Params, root: Path) -> dict[str, dict]:
    """Results by name, of the base and of the arms, in the arms' order: those that are current."""
    found = _current_or_none(params, root)
    return {name: found[name] for name in ("base", *ARMS) if found.get(name) is not None}


def outdated(params: Params, root: Path) -> list[str]:
    """Names of results that are stored but count no longer: something that decides them has changed since."""
    found = _current_or_none(params, root)
    return [name for name, result in found.items() if result is None and stored(name, root) is not None]


def _current_or_none(params: Params, root: Path) -> dict[str, dict | None]:
    """The current result of every experiment that goes with these parameters, None where there is none."""
    found = {}
    for name, made_by in makers(params, root).items():
        with suppress(ParamsError):  # what does not go with these parameters has not run with them
            found[name] = current(name, made_by, root)
    return found


def accept_results(names: Iterable[str], params: Params, root: Path) -> list[str]:
    """Those of ``names`` whose results the present code now counts as its own, see `accept_code`."""
    made_by = makers(params, root)
    return [name for name in names if accept_code(name, made_by[name], root)]


def blocks_of(results: dict[str, dict], params: Params, root: Path) -> dict[str, Block]:
    """What is said of the experiments, by the name of its place in docs/evidence.md, in the order of the report.

    What has not run, or not with these parameters, this code, base and data, is called not measured.
    """
    p = str(params.sparsity.p)
    read = lambda name: current(name, partial(UNTRAINED[name].made_by, params, root), root)  # noqa: E731
    return {
        "seeds": seeds_table(results, p),
        "arms": arms_table(results, p),
        "gradient": gradient_table(read("gradient"), gradient.why_not(params)),
        "budgets": budgets_table(results),
        "turns": turns_table(read("turns"), turns.why_not(params)),
        "lengths": lengths_table(read("lengths"), lengths.why_not(params)),
        "cost": cost_text(results.get("default")),
    }


def evidence_section(params: Params, root: Path) -> Section:
    """The same for the report."""
    title = "What in the training does it"
    if missing := [path.as_posix() for path in INPUTS if not (root / path).exists()]:
        return Section("evidence", title, [Missing("Controls and alternatives", f"no {', '.join(missing)}")])
    results = read_results(params, root)
    intro = Text(
        "Controls and alternatives, each trained from the same base with what its line says changed. Made by "
        "`make evidence`; docs/evidence.md says how to read it."
    )
    figure = [Plot(curves(results))] if len(results) > 1 else []
    blocks = blocks_of(results, params, root).values()
    return Section("evidence", title, [intro, *figure, *blocks])


def write_summary(params: Params, root: Path) -> dict:
    """Writes the tables of docs/evidence.md, the sentences of README.md and the figure plots/evidence.png; returns the
    figures that are quoted."""
    results = read_results(params, root)
    pages = pages_with(results, params, root)
    curves(results).save_png(root / "plots")
    for page, text in pages.items():
        write_text_atomic(root / page, text)
    return quoted(results, str(params.sparsity.p))


def pages_with(results: dict[str, dict], params: Params, root: Path) -> dict[Path, str]:
    """docs/evidence.md with the tables of ``results``, and README.md with what they say in short.

    Raises:
        ReadmeError: a page has no place for one of them.
    """
    asked_twice = current("turns", partial(turns.made_by, params, root), root)
    short = {"evidence": headline_text(results, asked_twice, str(params.sparsity.p))}
    pages = {}
    for path, blocks in ((PAGE, blocks_of(results, params, root)), (README, short)):
        pages[path] = (root / path).read_text(encoding="utf-8")
        for name, block in blocks.items():
            pages[path] = with_block(pages[path], name, render_block(block), path.as_posix())
    return pages


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


def curves(results: dict[str, dict]) -> Drawing:
    """Visual token ratio at the deployed budget over the training of the arms `DRAWN`."""
    trained = {name: results[name]["curve"] for name in DRAWN if name in results}

    def draw() -> Figure:
        figure = new_figure(7.2, 4.8)
        axes = figure.subplots()
        for place, (name, points) in enumerate(trained.items()):
            steps, ratios = [at["step"] for at in points], [at["visual_token_ratio"] for at in points]
            axes.plot(steps, ratios, color=f"C{place % 10}", linestyle=("-", "--")[place // 10], label=name)
        axes.set(xlabel="step", ylabel="visual tokens kept on validation", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if trained:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
        return figure

    return Drawing(
        "evidence",
        draw,
        "Visual tokens kept at the deployed budget over the training.",
        "Visual token ratio against training steps, a line for each of the main experiments.",
    )
