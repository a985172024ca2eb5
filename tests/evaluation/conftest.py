"""A tiny model of the real class with random weights, and questions it gets half right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sparsity_forcing.data.digits import corpus
from sparsity_forcing.data.digits_source import digits_row
from sparsity_forcing.data.schema import Row
from sparsity_forcing.evaluation.answers import answer_batch
from sparsity_forcing.methods import Full
from sparsity_forcing.models.prompts import question_messages
from sparsity_forcing.models.tiny import build_model, build_processor
from sparsity_forcing.params import DigitsParams, ScratchModel
from sparsity_forcing.scoring import exact_match

NEW_TOKENS = 6


@dataclass(frozen=True)
class Tiny:
    """``directory`` holds the same model and processor, as `save_pretrained` writes them."""

    model: torch.nn.Module
    processor: object
    directory: Path


def make_tiny(directory: Path, seed: int) -> Tiny:
    processor = build_processor(corpus())
    model = build_model(ScratchModel(layers=2), processor.tokenizer, seed).eval()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Tiny(model, processor, directory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "base", seed=0)


@pytest.fixture(scope="session")
def rows(tiny) -> list[Row]:
    """12 test questions of two lengths. A random model knows nothing, so every other answer is made what the dense
    model says: it is then right on half of them, and on fewer once tokens are dropped.
    """
    params = DigitsParams(grids=(6, 8), tasks=("read", "sum"), grey_share=0.1, clutter_share=0.1)
    made = [digits_row(params, 0, "test", place) for place in range(12)]
    for place in range(0, 12, 2):
        said = answer_batch(
            *(tiny.model, tiny.processor, [question_messages(made[place].question, made[place].images)], Full()),
            {"max_new_tokens": NEW_TOKENS, "do_sample": False},
        )[0].text
        assert exact_match(said, said) == 1.0
        made[place] = replace(made[place], answer=said)
    return made
