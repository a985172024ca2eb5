"""Numbers that the paper published (arXiv 2504.18579, Qwen2.5-VL-7B). None of them was measured by this project.

They stand here as printed: MME is the sum of perception and cognition (0-2800), OCRBench counts correct answers
(0-1000), everything else is a percentage. The paper does not state hardware, batch size or prompt lengths with them.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2504.18579"
SOURCE_URL = "https://arxiv.org/abs/2504.18579"
MODEL = "Qwen2.5-VL-7B"
_DIVISORS = {"MME": 28.0, "OCRBench": 10.0}  # to percent
OWN_METHOD = "Sparsity Forcing"


@dataclass(frozen=True)
class PublishedRow:
    """One method of a published table. ``token_ratio``: percent of tokens kept, all tokens counted."""

    method: str
    token_ratio: float
    scores: tuple[float, ...]
    mean: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """A published table: ``benchmarks`` name the columns of every row's ``scores``."""

    title: str
    benchmarks: tuple[str, ...]
    rows: tuple[PublishedRow, ...]


def mean_percent(benchmarks: tuple[str, ...], scores: tuple[float, ...]) -> float:
    """The paper's average: MME / 28 and OCRBench / 10 bring those two to percent, then a plain mean."""
    values = [score / _DIVISORS.get(name, 1.0) for name, score in zip(benchmarks, scores, strict=True)]
    return sum(values) / len(values)


IMAGE_BENCHMARKS = PublishedTable(
    title="Image benchmarks",
    benchmarks=("MME", "MMBench", "MMStar", "ChartQA", "TextVQA", "OCRBench", "MMMU-Pro"),
    rows=(
        PublishedRow("Full", 100.0, (2303, 83.9, 62.2, 84.0, 82.9, 845, 36.7), 73.8),
        PublishedRow("FastV", 52.1, (2115, 81.9, 61.2, 80.2, 79.6, 760, 34.5), 69.9),
        PublishedRow("ZipVL", 79.5, (2290, 83.9, 60.4, 82.0, 82.6, 837, 36.2), 72.9),
        PublishedRow(OWN_METHOD, 24.7, (2286, 84.1, 62.5, 83.1, 82.6, 847, 36.7), 73.6),
    ),
)
WAYS_TO_RAISE_SPARSITY = PublishedTable(
    title="Ways to raise sparsity",
    benchmarks=("MME", "MMStar", "ChartQA", "VideoMME"),
    rows=(
        PublishedRow("Full", 100.0, (2303, 62.2, 84.0, 64.5), 73.2),
        PublishedRow("MoBA", 25.0, (1906, 58.6, 77.3, 62.6), 66.6, "trainable block-sparse attention"),
        PublishedRow("Sharpness loss", 25.0, (1965, 59.6, 77.0, 63.7), 67.6, "regulariser (L∞ or entropy)"),
        PublishedRow("ZipVL post-trained", 61.7, (2264, 62.0, 78.9, 64.2), 71.5, "fine-tuning with sparse attention"),
        PublishedRow(OWN_METHOD, 26.4, (2286, 62.5, 83.1, 64.0), 72.8, "reinforcement learning"),
    ),
)
SELECTION_RULES = PublishedTable(
    title="Selection rules",
    benchmarks=("MME", "VideoMME"),
    rows=(
        PublishedRow("top-k", 25.0, (2160, 60.2)),
        PublishedRow("threshold", 37.8, (2218, 61.6)),
        PublishedRow("top-p", 24.1, (2286, 64.0)),
    ),
)
TABLES = (IMAGE_BENCHMARKS, WAYS_TO_RAISE_SPARSITY, SELECTION_RULES)

DECODE_SPEEDUP = "up to 3.3×"
MEMORY_REDUCTION = "up to 3×"
TRAINING_COST = "883 GPU hours (8 × A100)"
