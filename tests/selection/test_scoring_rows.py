"""Which rows are summed: text, probe, all."""

from __future__ import annotations

import pytest
import torch

from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout, scoring_rows

VISUAL = 9
PROBE = {"scoring_rows": "probe", "probe_recent": 5, "probe_random": 7}


def layout_of(*prompts: list[int]) -> PromptLayout:
    """A left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return PromptLayout.from_tokens(ids, (ids > 0).long(), (VISUAL,))


PROMPT = [1, 2, *[VISUAL] * 30, 3, 4, 5, 6]
SHORT = [1, VISUAL, 2, 3]
TEXT = [5, 4, 3, 2, 1]


def rows_of(layout: PromptLayout, layer: int = 0, **settings) -> torch.Tensor:
    return scoring_rows(layout, SparsityParams(**settings), layer)


def test_text_rows_are_those_after_the_last_visual_token():
    rows = rows_of(layout_of(PROMPT, TEXT), scoring_rows="text")
    assert rows[0].nonzero().flatten().tolist() == [32, 33, 34, 35]
    assert rows[1].nonzero().flatten().tolist() == [31, 32, 33, 34, 35]


def test_all_rows_are_all_but_padding():
    layout = layout_of(PROMPT, SHORT)
    assert torch.equal(rows_of(layout, scoring_rows="all"), layout.valid)


@pytest.mark.parametrize("layer", [0, 3])
def test_probe_rows_are_the_latest_and_some_random_earlier_ones(layer):
    layout = layout_of(PROMPT, SHORT)
    rows = rows_of(layout, layer, **PROBE)
    assert rows[0, -5:].all()
    assert rows[0].sum() == 12
    assert torch.equal(rows[1], layout.valid[1])  # fewer tokens than asked for: all of them


def test_probe_rows_differ_between_layers_and_seeds_and_repeat_themselves():
    layout = layout_of(PROMPT)
    drawn = {tuple(rows_of(layout, layer, **PROBE, probe_seed=s)[0].tolist()) for layer in range(4) for s in range(4)}
    assert len(drawn) == 16
    assert torch.equal(rows_of(layout, 2, **PROBE), rows_of(layout, 2, **PROBE))


def test_probe_rows_of_a_prompt_do_not_depend_on_its_batch_or_padding():
    alone = rows_of(layout_of(PROMPT[2:]), 1, **PROBE)[0]
    together = rows_of(layout_of(TEXT, PROMPT[2:], PROMPT), 1, **PROBE)[1]
    assert torch.equal(together[-len(alone) :], alone)
    assert not together[: -len(alone)].any()


def test_no_random_rows_leave_the_recent_ones():
    rows = rows_of(layout_of(PROMPT), **{**PROBE, "probe_random": 0})
    assert rows[0].nonzero().flatten().tolist() == [31, 32, 33, 34, 35]


def test_drawing_probe_rows_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    rows_of(layout_of(PROMPT), **PROBE)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_prompt_that_ends_with_a_visual_token_has_no_text_rows_and_is_refused():
    with pytest.raises(ValueError, match="prompt 1 ends with a visual token"):
        rows_of(layout_of(PROMPT, [1, VISUAL]), scoring_rows="text")
