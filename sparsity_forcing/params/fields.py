"""What the sections of params.yaml are made of."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Budget = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Rule = Literal["top_p", "top_k", "threshold"]
RankBy = Literal["normalized", "raw"]
ScoringRows = Literal["text", "probe", "all"]
PrefillKind = Literal["suffix", "sparse", "dense"]
Impl = Literal["auto", "eager", "triton"]
Task = Literal["read", "count", "sum"]
Grid = Annotated[int, Field(ge=3, le=64)]
Name = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator in use takes


def _non_empty_unique(values: tuple) -> tuple:
    if not values or len(set(values)) != len(values):
        raise ValueError("needs at least one entry and no entry twice")
    return values


Item = TypeVar("Item")
NonEmptyUnique = Annotated[tuple[Item, ...], AfterValidator(_non_empty_unique)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
