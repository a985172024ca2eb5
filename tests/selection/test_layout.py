"""Where things are in a prompt, and what of it may be dropped."""

from __future__ import annotations

import pytest
import torch

from sparsity_forcing.params import SparsityParams
from sparsity_forcing.selection import PromptLayout

VISUAL = 9
#        padding  text  image      text
PADDED = [0, 0, 1, 2, VISUAL, VISUAL, 3, VISUAL, 4, 5]
TEXT_ONLY = [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]


@pytest.fixture
def layout() -> PromptLayout:
    ids = torch.tensor([PADDED, TEXT_ONLY])
    return PromptLayout.from_tokens(ids, (ids > 0).long(), (VISUAL,))


def marks(row: torch.Tensor) -> str:
    return "".join("x" if here else "." for here in row.tolist())


def test_the_visual_prefix_ends_with_the_last_visual_token(layout):
    assert [marks(row) for row in layout.visual] == ["....xx.x..", ".........."]
    assert [marks(row) for row in layout.prefix] == ["..xxxxxx..", ".........."]
    assert (layout.batch, layout.length) == (2, 10)


def test_without_a_mask_every_token_is_real():
    layout = PromptLayout.from_tokens(torch.tensor([[1, VISUAL, 2]]), None, (VISUAL,))
    assert (marks(layout.valid[0]), marks(layout.prefix[0])) == ("xxx", "xx.")


def test_a_visual_id_under_padding_is_padding():
    layout = PromptLayout.from_tokens(torch.tensor([[VISUAL, 1, 2]]), torch.tensor([[0, 1, 1]]), (VISUAL,))
    assert (marks(layout.visual[0]), marks(layout.prefix[0])) == ("...", "...")


@pytest.mark.parametrize(
    "settings, image_row, text_row",
    [
        ({"protect_first": 0}, "....xx.x..", ".........."),
        ({"protect_first": 3}, ".....x.x..", ".........."),
        ({"protect_first": 0, "protect_last": 3}, "....xx....", ".........."),
        ({"protect_text": False, "protect_first": 0}, "..xxxxxxx.", "......xxx."),
        ({"protect_text": False, "protect_first": 2}, "....xxxxx.", "........x."),
        ({"protect_text": False, "protect_first": 2, "protect_last": 2}, "....xxxx..", ".........."),
        ({"protect_text": False, "protect_first": 9, "protect_last": 9}, "..........", ".........."),
    ],
)
def test_text_first_and_last_tokens_are_protected_and_padding_never_counts(layout, settings, image_row, text_row):
    droppable = layout.droppable(SparsityParams(**settings))
    assert [marks(row) for row in droppable] == [image_row, text_row]


def test_rows_repeat_next_to_each_other(layout):
    repeated = layout.repeat(3)
    assert [marks(row) for row in repeated.visual] == ["....xx.x.."] * 3 + [".........."] * 3
    assert repeated.seeds.tolist() == [layout.seeds[0].item()] * 3 + [layout.seeds[1].item()] * 3


def test_a_seed_belongs_to_the_prompt_and_not_to_its_padding_or_its_batch(layout):
    alone = PromptLayout.from_tokens(torch.tensor([PADDED[2:]]), None, (VISUAL,))
    assert alone.seeds[0] == layout.seeds[0] != layout.seeds[1]


def test_a_seed_depends_on_the_order_of_the_tokens():
    prompts = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4], [4, 3, 2, 1], [1, 2, 4, 3]])
    assert len(set(PromptLayout.from_tokens(prompts, None, ()).seeds.tolist())) == 4


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask \(1, 4\) must have the shape of input_ids \(1, 3\)"):
        PromptLayout.from_tokens(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 4), (VISUAL,))
