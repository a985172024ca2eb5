"""The rows of the comparison table, one small file per method.

How to add a method:

1. Write ``methods/NAME.py``: a frozen dataclass that extends `Method`, with the row's ``name``, its budget ``p`` (1 if
   it has none) and ``attend(model)``. Its docstring links the source and says what it selects and what it trains.
2. Choose it in `rows_to_compare` (or pass it to `evaluation.runner` yourself).
3. Add it to tests/evaluation/test_methods.py, where every method runs the same checks on a tiny model.
"""

from __future__ import annotations

from sparsity_forcing.methods.base import Method
from sparsity_forcing.methods.full import Full
from sparsity_forcing.methods.threshold import Threshold
from sparsity_forcing.methods.top_k import TopK
from sparsity_forcing.methods.top_p import TopP
from sparsity_forcing.params import Baseline, SparsityParams

__all__ = ["Full", "Method", "Threshold", "TopK", "TopP", "rows_to_compare", "sparse_method"]

_BY_RULE = {"top_p": TopP, "top_k": TopK, "threshold": Threshold}


def sparse_method(settings: SparsityParams, p: float) -> Method:
    """The method of the rule in ``settings`` at budget ``p``."""
    return _BY_RULE[settings.rule](p=p, settings=settings)


def rows_to_compare(
    settings: SparsityParams, budgets: tuple[float, ...], baselines: tuple[Baseline, ...] = ()
) -> tuple[Method, ...]:
    """What every checkpoint is evaluated with: dense, then by rule (that of ``settings`` first) and by budget."""
    methods = [sparse_method(settings, p) for p in budgets]
    methods += [_BY_RULE[other.rule](p=other.p, settings=settings) for other in baselines]
    rules = list(dict.fromkeys(method.rule for method in methods))
    return (Full(), *sorted(methods, key=lambda method: (rules.index(method.rule), method.p)))
