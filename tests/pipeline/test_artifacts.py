"""What the flows show beside the log."""

from __future__ import annotations

from flows.artifacts import find_links, summary
from sparsity_forcing.params import load_params
from sparsity_forcing.tracking import Tracker

REPORT = """# Sparsity Forcing

The headline.

## Result
![pareto](figures/pareto.svg)
| method | accuracy |

## Training
Curves.
"""


def test_the_summary_is_the_first_section_without_pictures():
    text = summary(REPORT)
    assert "The headline." in text
    assert "| method | accuracy |" in text
    assert "pareto" not in text
    assert "Training" not in text


def test_links_name_the_report_and_the_latest_evaluated_rows(smoke_workspace):
    params = load_params(smoke_workspace / "params.yaml")
    with Tracker(params.tracking, smoke_workspace).run(stage="evaluate", name="base dense") as run:
        pass
    links = find_links(params, smoke_workspace)
    assert links.report == smoke_workspace / "reports" / "index.html"
    assert run.run_id in links.compare
