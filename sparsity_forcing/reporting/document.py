"""What a report consists of, before it is HTML or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparsity_forcing.reporting.drawing import Drawing


@dataclass(frozen=True)
class Card:
    """One number of the summary row. ``detail`` says what it is measured against."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Missing:
    """What could not be shown, and why."""

    kind: ClassVar[str] = "missing"
    what: str
    reason: str


@dataclass(frozen=True)
class Column:
    """``group``: heading over neighbouring columns, such as "published" over the paper's."""

    label: str
    numeric: bool = True
    group: str = ""


@dataclass(frozen=True)
class Table:
    """``highlight``: index of rows to set off; ``folded``: closed until opened."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    highlight: frozenset[int] = frozenset()
    folded: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.caption!r}: a row of {len(row)} cells for {len(self.columns)} columns")

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Neighbouring columns of one group: (heading, how many); empty where no column has a group."""
        if not any(column.group for column in self.columns):
            return []
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans


@dataclass(frozen=True)
class Plot:
    kind: ClassVar[str] = "plot"
    drawing: Drawing


@dataclass(frozen=True)
class Strip:
    """One row of small pictures: PNG bytes with the caption under each."""

    label: str
    pictures: Sequence[tuple[bytes, str]]


@dataclass(frozen=True)
class Example:
    """One question with its picture and, below each other, what two models keep of it."""

    kind: ClassVar[str] = "example"
    question: str
    facts: Sequence[tuple[str, str]]
    picture: bytes
    strips: Sequence[Strip]
    drawing: Drawing


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    caption: str
    text: str


@dataclass(frozen=True)
class Links:
    kind: ClassVar[str] = "links"
    links: Sequence[tuple[str, str]]
    note: str = ""


Block = Text | Missing | Table | Plot | Example | Code | Links


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """The whole report. ``settings`` are the conditions the headline holds under."""

    title: str
    headline: str
    settings: Sequence[tuple[str, str]]
    cards: Sequence[Card]
    sections: Sequence[Section]

    def drawings(self) -> list[Drawing]:
        """Every figure, in order."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [block.drawing for block in blocks if isinstance(block, Plot | Example)]
