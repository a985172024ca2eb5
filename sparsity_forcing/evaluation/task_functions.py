"""What the generated lmms-eval tasks do with a document: its images, its question, its answer, its score."""

from __future__ import annotations

from PIL import Image

from sparsity_forcing.models.prompts import to_pil
from sparsity_forcing.scoring import score_function

METRIC = "accuracy"


def doc_to_visual(doc: dict) -> list[Image.Image]:
    """The images in prompt order, as training sees them."""
    return [to_pil(image) for image in doc["images"]]


def doc_to_text(doc: dict) -> str:
    return doc["question"]


def doc_to_target(doc: dict) -> str:
    return doc["answer"]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The score of the generated text by the document's own score function, the one training rewards with."""
    return {METRIC: score_function(doc["score"])(results[0], doc["answer"])}
