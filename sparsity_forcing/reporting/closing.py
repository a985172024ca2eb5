"""The last sections of the report: beside the paper, what to keep in mind, where it all comes from."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from sparsity_forcing.lineage import Lineage
from sparsity_forcing.params import Params
from sparsity_forcing.reporting import formatting as fmt
from sparsity_forcing.reporting import published
from sparsity_forcing.reporting.content import POLICY_ARM, Headline, Measured, model_name
from sparsity_forcing.reporting.document import Block, Code, Column, Links, Section, Table, Text
from sparsity_forcing.reporting.inputs import Inputs


def paper_section(inputs: Inputs, found: Headline, params: Params, measured: Measured) -> Section:
    """The paper's figures in their own columns, beside what was measured here."""
    there = f"published ({published.MODEL}, {published.SOURCE})"
    here = "measured here"
    columns = [Column("Method", numeric=False)]
    columns += [Column(label, group=there) for label in ("τ", "mean score", "to Full")]
    columns += [Column(label, group=here) for label in ("τ", "τ visual", "accuracy", "to dense base")]
    full = published.IMAGE_BENCHMARKS.rows[0].mean
    ours = {"Full": found.dense, published.OWN_METHOD: found.after}
    rows = []
    for row in published.IMAGE_BENCHMARKS.rows:
        mine = ours.get(row.method)
        measured_cells = [fmt.NOT_MEASURED] * 4
        if mine is not None:
            measured_cells = [
                fmt.percent(mine.token_ratio),
                fmt.percent(mine.visual_token_ratio),
                fmt.percent(mine.accuracy),
                fmt.points(mine.accuracy - found.dense.accuracy),
            ]
        published_cells = [f"{row.token_ratio:.1f}%", f"{row.mean:.1f}", fmt.points((row.mean - full) / 100)]
        rows.append([row.method, *published_cells, *measured_cells])
    quoted = measured.main["arms"][POLICY_ARM] if measured.main is not None else None
    decode = fmt.NOT_MEASURED if quoted is None else f"{1 / quoted['decode_ratio']['median']:.2f}×"
    memory = fmt.NOT_MEASURED if quoted is None else f"{1 / quoted['cache_ratio']:.2f}× (cache bytes)"
    cost = [
        ["Decode speed-up", published.DECODE_SPEEDUP, decode],
        ["Memory reduction", published.MEMORY_REDUCTION, memory],
        ["Training", published.TRAINING_COST, fmt.duration(inputs.metric("train", "seconds"))],
    ]
    cost_columns = [Column("", numeric=False), Column("published"), Column(here)]
    intro = (
        f"The two halves of this table are different experiments: the paper's {published.MODEL} on seven public "
        f"benchmarks, and here {model_name(params, inputs)} on {params.data.source} questions. They show whether the "
        "same thing happens, not which is better. The paper names no hardware, batch or prompt length for its speed-up."
    )
    blocks: list[Block] = [
        Text(intro),
        Table("Accuracy and tokens kept", columns, rows, highlight=frozenset({len(rows) - 1})),
        Table("Speed, memory and training cost", cost_columns, cost),
        *(_published_table(table) for table in published.TABLES),
        Links([(f"{published.SOURCE}, Sparsity Forcing", published.SOURCE_URL)]),
    ]
    return Section("paper", "Beside the paper", blocks)


def _published_table(table: published.PublishedTable) -> Table:
    has_mean = all(row.mean is not None for row in table.rows)
    columns = [Column("Method", numeric=False), Column("τ"), *(Column(name) for name in table.benchmarks)]
    rows = [[row.method, f"{row.token_ratio:g}%", *(f"{score:g}" for score in row.scores)] for row in table.rows]
    if has_mean:
        columns.append(Column("mean"))
        rows = [[*cells, f"{row.mean:.1f}"] for cells, row in zip(rows, table.rows, strict=True)]
    return Table(f"Published: {table.title} ({published.MODEL})", columns, rows, folded=True)


def limits_section(params: Params) -> Section:
    """What a reader must not conclude."""
    notes = [
        "The headline is one training run with one seed; what other seeds gave, where they have run, is said above.",
        "Training lowers a token ratio, not a latency. What that is worth in time depends on hardware, batch and "
        "length; the section on decode time states what was measured.",
    ]
    policy = params.train.selection_policy
    if policy.sigma:
        scale = f"{policy.sigma:g}" if policy.final_sigma is None else f"{policy.sigma:g} to {policy.final_sigma:g}"
        notes.append(
            "Rollouts choose tokens at random around the rule (Gaussian noise on the log attention mass, "
            f"σ = {scale}), which gives the efficiency reward a gradient. That is this "
            "project's addition to the paper's objective. At deployment the noise is off and the rule is plain top-p; "
            "scoring rows and prefill are those of the table above."
        )
    if params.sparsity.protect_text:
        notes.append("Text is never dropped, so τ over all tokens cannot fall below the text's share of a prompt.")
    if params.model.name == "scratch":
        notes.append(
            "The model is small and the questions are made from real handwriting on synthetic canvases: the numbers "
            "say what happens here, not what a large pretrained model would gain."
        )
    return Section("limits", "What to keep in mind", [Text(note) for note in notes])


def lineage_section(
    lineage: Lineage, params: Params, links: Sequence[tuple[str, str]], run_ids: Sequence[str]
) -> Section:
    """Code, data, versions, parameters and runs behind every number above."""
    state = " with uncommitted changes" if lineage.git.dirty and lineage.git.commit != "none" else ""
    code = [["git commit", lineage.git.commit + state], ["preset", params.preset], ["seed", str(params.seed)]]
    two = [Column("", numeric=False), Column("", numeric=False)]
    blocks: list[Block] = [Table("Code", two, code)]
    if lineage.data:
        md5s = [[path, md5] for path, md5 in sorted(lineage.data.items())]
        blocks.append(Table("Data and models, as in dvc.lock", [Column("Path", False), Column("md5", False)], md5s))
    else:
        blocks.append(Text("Data md5s: nothing that dvc.yaml names is there."))
    versions = [[name, version] for name, version in lineage.versions.items()]
    blocks.append(Table("Versions", [Column("Package", False), Column("Version", False)], versions, folded=True))
    blocks.append(Code("Parameters", yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False)))
    if links:
        note = "Links to 127.0.0.1 open while `make ui` runs. Evaluation runs: "
        blocks.append(Links(links, note + ", ".join(run_ids)))
    else:
        blocks.append(Text("MLflow: no evaluation run is recorded in this workspace."))
    return Section("lineage", "Lineage", blocks)
