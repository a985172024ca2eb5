"""params.yaml as validated types.

One file holds every parameter of the pipeline. A preset is such a file (``presets/``). What is left out has the default
of this package; what is unknown, out of range or contradictory is an error that names the key, the value and what is
allowed, before anything runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from sparsity_forcing.params.fields import Budget, RankBy, Rule, Section, Seed, Share
from sparsity_forcing.params.inputs import (
    COLOURED_DIGITS,
    DataParams,
    DigitsParams,
    ModelParams,
    Phase,
    ScratchModel,
)
from sparsity_forcing.params.measuring import (
    Baseline,
    EvaluateParams,
    ProfileParams,
    ReportParams,
    SparsityParams,
    TrackingParams,
)
from sparsity_forcing.params.training import LoraParams, SelectionPolicyParams, TrainParams

__all__ = [
    "COLOURED_DIGITS",
    "Baseline",
    "Budget",
    "DataParams",
    "DigitsParams",
    "LoraParams",
    "ModelParams",
    "Params",
    "ParamsError",
    "Phase",
    "ProfileParams",
    "RankBy",
    "Rule",
    "ScratchModel",
    "SelectionPolicyParams",
    "Share",
    "SparsityParams",
    "TrackingParams",
    "TrainParams",
    "load_params",
    "parse_params",
]


class ParamsError(ValueError):
    """A parameter file is not usable; the message names every key at fault, its value and what is allowed."""


class Params(Section):
    """Every parameter of the pipeline."""

    preset: str = "digits"
    seed: Seed = 0
    data: DataParams = DataParams()
    model: ModelParams
    sparsity: SparsityParams = SparsityParams()
    profile: ProfileParams = ProfileParams()
    train: TrainParams = TrainParams()
    evaluate: EvaluateParams = EvaluateParams()
    report: ReportParams = ReportParams()
    tracking: TrackingParams = TrackingParams()

    @model_validator(mode="after")
    def _own_rows_need_an_own_model(self) -> Self:
        if self.data.source != "digits" and self.model.name == "scratch":
            raise ValueError(
                f"data.source {self.data.source!r} does not go with model.name 'scratch', a model that is trained on "
                "the digits alone: name a hub id or a directory below user_models/"
            )
        return self

    @model_validator(mode="after")
    def _deployment_budget_is_evaluated(self) -> Self:
        if not any(math.isclose(self.sparsity.p, p) for p in self.evaluate.budgets):
            raise ValueError(
                f"evaluate.budgets {list(self.evaluate.budgets)} must hold the deployment budget sparsity.p = "
                f"{self.sparsity.p}: the headline is measured at it"
            )
        return self

    @model_validator(mode="after")
    def _no_row_is_evaluated_twice(self) -> Self:
        rows = [(self.sparsity.rule, p) for p in self.evaluate.budgets]
        for baseline in self.evaluate.baselines:
            if (row := (baseline.rule, baseline.p)) in rows:
                raise ValueError(f"evaluate.baselines: {row[0]} at p = {row[1]} is evaluated already; name it once")
            rows.append(row)
        return self

    @model_validator(mode="after")
    def _grids_hold_what_is_drawn_on_them(self) -> Self:
        if self.data.source == "digits":
            with_shares = "drawn with the shares of data.digits, "
            self.data.digits.require_room(self.profile.grids, what=f"profile.grids: {with_shares}")
            self.data.digits.require_room(self.report.decode_grids, what=f"report.decode_grids: {with_shares}")
        return self


def load_params(path: str | Path = "params.yaml") -> Params:
    """Reads and validates a parameter file.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds keys or values that are not allowed.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist; copy one of presets/*.yaml to it") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} must hold a mapping of parameters, got {type(values).__name__}")
    return parse_params(values, source=str(path))


def parse_params(values: dict, source: str = "params") -> Params:
    """Validates a mapping of parameters; ``source`` names it in errors."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ParamsError("\n".join([f"{source} has {error.error_count()} error(s):", *_describe(error)])) from None


def _describe(error: ValidationError) -> list[str]:
    lines = []
    for issue in error.errors():
        key = ".".join(str(part) for part in issue["loc"]) or "(whole file)"
        if issue["type"] == "extra_forbidden":
            allowed = _allowed_keys(issue["loc"][:-1])
            hint = f" Allowed here: {', '.join(allowed)}." if allowed else ""
            lines.append(f"  {key}: unknown parameter (value {issue['input']!r}).{hint}")
        elif issue["type"] == "missing":
            lines.append(f"  {key}: missing.")
        else:
            value = issue["input"]
            shown = repr(value) if not isinstance(value, dict | BaseModel) else "this section"
            lines.append(f"  {key}: {issue['msg']} (got {shown}).")
    return lines


def _allowed_keys(location: tuple) -> list[str]:
    section: type[BaseModel] = Params
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = getattr(annotation, "__args__", (annotation,))[0]
    return sorted(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
