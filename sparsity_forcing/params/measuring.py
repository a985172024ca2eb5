"""The sections of what is deployed, measured and reported."""

from __future__ import annotations

from sparsity_forcing.params.fields import (
    AtLeastTwo,
    Budget,
    Grid,
    Impl,
    Name,
    NonEmptyUnique,
    NonNegative,
    Positive,
    PrefillKind,
    RankBy,
    Rule,
    ScoringRows,
    Section,
    Seed,
)


class SparsityParams(Section):
    """How a layer selects its kept set."""

    p: Budget = 0.975
    rule: Rule = "top_p"
    rank_by: RankBy = "normalized"
    scoring_rows: ScoringRows = "text"
    prefill: PrefillKind = "suffix"
    protect_text: bool = True
    protect_first: NonNegative = 4
    protect_last: Positive = 1
    probe_recent: Positive = 64
    probe_random: NonNegative = 64
    probe_seed: Seed = 0
    impl: Impl = "auto"


class ProfileParams(Section):
    """``rows``: questions per setting. ``grids`` are the prompt lengths of the digits source; the user's own rows are
    taken in thirds by length.
    """

    budgets: NonEmptyUnique[Budget] = (0.5, 0.7, 0.8, 0.9, 0.94, 0.975, 1.0)
    scoring_rows: NonEmptyUnique[ScoringRows] = ("text", "probe", "all")
    grids: NonEmptyUnique[Grid] = (6, 8, 12)
    rows: Positive = 96
    batch_size: Positive = 48
    max_new_tokens: Positive = 16


class Baseline(Section):
    """A rule at a budget that both checkpoints are evaluated with beside the deployed one: what training is worth is
    seen against what another rule or budget gives without it."""

    rule: Rule = "top_p"
    p: Budget


class EvaluateParams(Section):
    """``workers``: processes at a time, which share the rows of the table, each with a model of its own, in turn on the
    GPUs where there are several; 1 where two models do not fit the device.
    ``limit``: questions per task, the first ones; all where null.
    """

    budgets: NonEmptyUnique[Budget] = (0.94, 0.975)
    baselines: tuple[Baseline, ...] = ()
    workers: Positive = 2
    batch_size: Positive = 64
    max_new_tokens: Positive = 16
    limit: Positive | None = None


class ReportParams(Section):
    """``kept_rows``: test questions whose kept sets are looked at in single cells. Decode time is measured at every
    grid of ``decode_grids`` (source `digits`), or on the user's longest prompts."""

    examples: NonNegative = 3
    kept_rows: Positive = 96
    decode_grids: NonEmptyUnique[Grid] = (8, 12, 24)
    decode_batch_size: Positive = 4
    decode_tokens: AtLeastTwo = 32
    decode_repetitions: Positive = 7


class TrackingParams(Section):
    experiment: Name = "sparsity-forcing"
    registered_model: Name = "sparsity-forcing-policy"
    alias: Name = "candidate"
