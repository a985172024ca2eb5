"""The page and the Markdown: every number from the metrics, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
from report_workspace import PROFILE_POINT, digit_rows, made_up_measurements

from sparsity_forcing.lineage import GitState, Lineage
from sparsity_forcing.reporting import published
from sparsity_forcing.reporting.build import build_report, write_report
from sparsity_forcing.reporting.content import POLICY_ARM, Measured, find_headline
from sparsity_forcing.reporting.document import Table, Text
from sparsity_forcing.reporting.inputs import ReportError, read_inputs
from sparsity_forcing.reporting.markdown import render_markdown
from sparsity_forcing.reporting.page import render_html

LINEAGE = Lineage(GitState("c0ffee" * 6 + "c0ff", dirty=True), {"data/prepared": "md5-of-data"}, {"torch": "9.8.7"})


def document(params, root, measured: Measured | None = None, lineage: Lineage = LINEAGE):
    inputs = read_inputs(root)
    found = find_headline(inputs.table, params, inputs.samples)
    measured = measured or made_up_measurements(digit_rows(3))
    ids = [item.row.id for item in measured.kept["policy"].rows[:2]] if measured.kept else []
    links = [("Compare", "http://127.0.0.1:5000/#/compare-runs?runs=x")]
    return build_report(params, inputs, found, measured, ids, lineage, links, ["run-17"])


@pytest.fixture(scope="module")
def report(report_params, unchanged_root):
    return document(report_params, unchanged_root)


@pytest.fixture(scope="module")
def page(report) -> str:
    return render_html(report)


class Checker(HTMLParser):
    """Notes every resource that is loaded and every tag that is not closed in turn."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(tag, values)

    def handle_startendtag(self, tag, attributes):
        self._note(tag, dict(attributes))

    def _note(self, tag, values):
        self.ids += [values["id"]] if "id" in values else []
        for name in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
            if name in values and tag != "a":
                self.loads.append(values[name])
            elif name in values and values[name].startswith("#"):
                self.references.append(values[name])

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


def test_page_loads_nothing_from_elsewhere(page):
    checker = check(page)
    outside = [address for address in checker.loads if not address.startswith(("data:image/png;base64,", "#"))]
    assert outside == []
    assert {"img", "svg"} <= checker.tags
    assert checker.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_is_well_formed(page):
    checker = check(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    inside = [address for address in (*checker.references, *checker.loads) if address.startswith("#")]
    assert {address[1:] for address in inside} <= set(checker.ids)


def test_text_is_escaped(report):
    page = render_html(replace(report, headline="<script>alert(1)</script> & more", sections=()))
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_figures_follow_the_page_and_keep_their_text(report):
    for drawing in report.drawings():
        svg = drawing.inline_svg()
        assert "var(--ink)" in svg
        assert "#010203" not in svg
        assert "#040506" not in svg


def change(root, file: str, edit) -> None:
    path = root / file
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def set_row(values: dict, method: str, checkpoint: str, p: float, **fields) -> None:
    for row in values["rows"]:
        if (row["method"], row["checkpoint"], row["p"], row["benchmark"]) == (method, checkpoint, p, "average"):
            row.update(fields)


EVALUATE = "metrics/evaluate.json"
CHANGES = {
    "policy visual ratio": (EVALUATE, ("top-p", "policy", 0.975, {"visual_token_ratio": 0.12345}), "12.3%"),
    "policy ratio": (EVALUATE, ("top-p", "policy", 0.975, {"token_ratio": 0.23456}), "23.5%"),
    "policy accuracy": (EVALUATE, ("top-p", "policy", 0.975, {"accuracy": 0.76543}), "76.5%"),
    "policy interval": (EVALUATE, ("top-p", "policy", 0.975, {"accuracy_low": 0.51234}), "51.2–"),
    "dense accuracy": (EVALUATE, ("Full", "base", 1.0, {"accuracy": 0.86421}), "86.4%"),
    "base visual ratio": (EVALUATE, ("top-p", "base", 0.975, {"visual_token_ratio": 0.65432}), "65.4%"),
    "other budget": (EVALUATE, ("top-p", "policy", 0.94, {"token_ratio": 0.34567}), "34.6%"),
    "questions": (EVALUATE, ("top-p", "policy", 0.975, {"n": 98765}), "98,765"),
    "training time": ("metrics/train.json", {"seconds": 4321.0}, "1 h 12 min"),
    "rollouts": ("metrics/train.json", {"rollouts": 76543}, "76,543 rollouts"),
    "new tokens": ("metrics/train.json", {"new_tokens": 8765432}, "8,765,432"),
    "skipped steps": ("metrics/train.json", {"skipped_steps": 1717}, "1,717"),
    "replay": ("metrics/train.json", {"replay_max_difference": 7.7e-9}, "7.7e-09"),
    "end of training": ("metrics/train.json", {"end": {"visual_token_ratio": 0.04321}}, "4.3%"),
    "profile": ("metrics/profile.json", {"by_budget": [PROFILE_POINT | {"token_ratio": 0.45678}]}, "45.7%"),
    "parameters": ("metrics/base.json", {"parameters": 7654321}, "7,654,321 parameters"),
    "base time": ("metrics/base.json", {"seconds": 54.0}, "54 s"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_metric_changes_the_report(name, report_params, report_root):
    file, fields, expected = CHANGES[name]
    assert expected not in render_markdown(document(report_params, report_root))
    if file == EVALUATE:
        method, checkpoint, p, changed = fields
        change(report_root, file, lambda values: set_row(values, method, checkpoint, p, **changed))
    else:
        change(report_root, file, lambda values: values.update(fields))
    assert expected in render_markdown(document(report_params, report_root))


def test_page_says_what_the_markdown_says(report, page):
    """So that the quick tests on the Markdown hold for the page."""
    page = html.unescape(page)
    markdown = render_markdown(report)
    tables = [block for section in report.sections for block in section.blocks if isinstance(block, Table)]
    said = [report.headline, *(text for pair in report.settings for text in pair)]
    said += [text for card in report.cards for text in (card.label, card.value, card.detail)]
    said += [cell for table in tables for row in table.rows for cell in row]
    said += [block.text for section in report.sections for block in section.blocks if isinstance(block, Text)]
    assert len(said) > 200
    for text in said:
        assert text in page
        assert text in markdown


def test_a_changed_metric_changes_the_figure(report_params, report_root):
    before = document(report_params, report_root).drawings()[0].inline_svg()
    assert document(report_params, report_root).drawings()[0].inline_svg() == before
    change(report_root, EVALUATE, lambda values: set_row(values, "top-p", "policy", 0.94, visual_token_ratio=0.5))
    assert document(report_params, report_root).drawings()[0].inline_svg() != before


MEASUREMENTS = {
    "decode ratio": (("decode_ratio", {"median": 0.613, "low": 0.6, "high": 0.62}), "0.61×"),
    "decode time": (("decode_ms_per_token", {"median": 77.77, "low": 70.0, "high": 80.0}), "77.77"),
    "cache ratio": (("cache_ratio", 0.1777), "18%"),
    "cache bytes": (("cache_bytes", 5 * 2**20), "5.0 MiB"),
    "time to first token": (("prefill_ratio", {"median": 2.22, "low": 2.0, "high": 2.5}), "2.22×"),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_changed_measurement_changes_the_report(name, report_params, report_root):
    (key, value), expected = MEASUREMENTS[name]
    measured = made_up_measurements(digit_rows(3))
    assert expected not in render_markdown(document(report_params, report_root, measured))
    measured.lengths[-1]["arms"][POLICY_ARM][key] = value
    assert expected in render_markdown(document(report_params, report_root, measured))


@pytest.mark.parametrize(
    "low,high,verdict",
    [(0.7, 0.9, "faster at 576"), (1.1, 1.3, "slower at 576"), (0.9, 1.1, "not clearly different at 576")],
)
def test_the_verdict_on_speed_goes_by_the_quartiles(low, high, verdict, report_params, report_root):
    measured = made_up_measurements(digit_rows(3))
    del measured.lengths[0]
    measured.lengths[0]["arms"][POLICY_ARM]["decode_ratio"].update(low=low, high=high)
    assert f"Decoding with the trained policy is {verdict} visual tokens" in render_markdown(
        document(report_params, report_root, measured)
    )


def test_the_length_quoted_is_one_that_was_evaluated(report_params, report_root):
    measured = replace(made_up_measurements(digit_rows(3)), evaluated_visual_tokens=200)
    short, long = measured.lengths
    short["arms"][POLICY_ARM]["cache_ratio"] = 0.3333
    assert measured.main is short
    markdown = render_markdown(document(report_params, report_root, measured))
    assert "| Cache bytes | **33%** | of dense, 144 visual tokens, batch 4 |" in markdown
    assert "| **576 †** |" in markdown
    assert "† Longer than any question of the evaluation" in markdown
    assert replace(measured, evaluated_visual_tokens=576).main is long
    assert replace(measured, evaluated_visual_tokens=1).main is short


def test_layers_and_differences_come_from_the_samples(report_params, report_root):
    path = report_root / "evaluation/samples.parquet"
    samples = pd.read_parquet(path)
    chosen = (samples["checkpoint"] == "policy") & (samples["p"] == 0.975)
    samples.loc[chosen, "layer_visual_ratio"] = samples.loc[chosen, "layer_visual_ratio"].map(lambda _: [0.777, 0.111])
    samples.loc[chosen, "score"] = 1.0
    samples.loc[chosen, "prompt_tokens"] = 4242
    samples.to_parquet(path)
    markdown = render_markdown(document(report_params, report_root))
    assert "| 0 | 89.7% | 77.7% |" in markdown
    assert "| 1 | 88.7% | 11.1% |" in markdown
    assert "60–4242 tokens" in markdown
    assert "(95% interval −" in markdown  # one of ten gained: the interval holds zero


def test_published_and_measured_never_share_a_column(report, report_params, report_root):
    section = next(section for section in report.sections if section.name == "paper")
    table = next(block for block in section.blocks if getattr(block, "groups", None))
    assert [span for _, span in table.groups] == [1, 3, 4]
    rows = {row[0]: row for row in table.rows}
    for row in published.IMAGE_BENCHMARKS.rows:
        assert rows[row.method][1:3] == [f"{row.token_ratio:.1f}%", f"{row.mean:.1f}"]
    assert rows["FastV"][4:] == ["not measured"] * 4
    change(report_root, EVALUATE, lambda v: set_row(v, "top-p", "policy", 0.975, visual_token_ratio=0.0987))
    again = next(s for s in document(report_params, report_root).sections if s.name == "paper")
    ours = next(row for row in again.blocks[1].rows if row[0] == published.OWN_METHOD)
    assert ours[5] == "9.9%"
    assert ours[1:4] == rows[published.OWN_METHOD][1:4]


def test_lineage_is_in_the_report(report, page):
    for text in (page, render_markdown(report)):
        for expected in (LINEAGE.git.commit, "uncommitted changes", "md5-of-data", "9.8.7", "run-17", "decode_grids"):
            assert expected in text


@pytest.mark.parametrize(
    "file,said",
    [
        ("metrics/train.json", "Training cost"),
        ("plots/train.csv", "Token ratio and accuracy during training"),
        ("metrics/profile.json", "Profile of the base model"),
        ("evaluation/samples.parquet", "Token ratio of each layer"),
    ],
)
def test_what_is_missing_is_said(file, said, report_params, report_root):
    (report_root / file).unlink()
    assert f"{said}: **not measured** ({file} is not there" in render_markdown(document(report_params, report_root))


def test_nothing_measured_at_all(report_params, report_root):
    reason = "models/policy is not there"
    measured = Measured("Test processor", missing={"kept": reason, "efficiency": reason})
    page = render_html(document(report_params, report_root, measured))
    assert page.count(f"not measured.</strong> {reason}") == 2
    check(page)


def test_an_evaluation_of_other_budgets_is_refused(report_params, report_root):
    change(report_root, EVALUATE, lambda v: v.update(rows=[row for row in v["rows"] if row["p"] != 0.975]))
    with pytest.raises(ReportError, match=r"evaluate\.json does not fit params\.yaml.*0\.975.*evaluate"):
        document(report_params, report_root)


def test_a_damaged_file_is_named(report_params, report_root):
    (report_root / "metrics/train.json").write_text("{", encoding="utf-8")
    with pytest.raises(ReportError, match=r"train\.json cannot be read.*train"):
        read_inputs(report_root)


def test_written_report_is_whole(report, tmp_path):
    folder = tmp_path / "reports"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "old.png").write_text("from the run before")
    write_report(report, folder)
    markdown = (folder / "index.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(pictures) == len(report.drawings()) > 4
    assert {folder / name for name in pictures} == set((folder / "figures").iterdir())
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert (folder / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")
