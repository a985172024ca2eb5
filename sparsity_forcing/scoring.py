"""How right an answer is: pure functions ``(prediction, answer) -> score`` with scores in 0-1.

The same function, by the same name, is the correctness reward in training and the accuracy in evaluation, so that a
model is never trained on one ruler and judged by another. An empty prediction scores 0 whatever the function says, and
no function here asks whether the answer occurs *somewhere* in the prediction: a model that says everything would win.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import threading
import unicodedata
from collections.abc import Callable
from functools import wraps
from pathlib import Path

ScoreFunction = Callable[[str, str], float]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?=\D|$)")
_WHOLE_NUMBER_TEXT = re.compile(r"[$€£]?\s*(?P<number>[-+]?[\d.,]+(?:[eE][-+]?\d+)?)\s*(?P<percent>%?)")
_CHOICE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?\s*:?\s*)?"  # "The answer is"
    r"(?:\((?P<bracketed>[a-z])\)|(?P<bare>[a-z])(?=[.:)]|$))"  # "(B)", "B", "B.", "B) a cat"
)


class ScoreError(ValueError):
    """A score function is unknown, cannot be imported, or returned something that is not a score in 0-1."""


def normalize(text: str) -> str:
    """Compatibility-composed, case-folded, single-spaced, without surrounding space or a closing full stop."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.removesuffix(".").rstrip()


def exact_match(prediction: str, answer: str) -> float:
    """1 if both are the same text once normalised (see :func:`normalize`), else 0."""
    predicted = normalize(prediction)
    return float(bool(predicted) and predicted == normalize(answer))


def numeric(prediction: str, answer: str) -> float:
    """1 if the last number of the prediction is the last number of the answer (relative difference up to 1e-6)."""
    predicted, expected = _last_number(prediction), _last_number(answer)
    if predicted is None or expected is None:
        return 0.0
    return float(math.isclose(predicted, expected, rel_tol=1e-6))


def multiple_choice(prediction: str, answer: str) -> float:
    """1 if the prediction opens with the answer's option letter: "B", "(b)", "B. a cat", "The answer is B"."""
    predicted, expected = _choice(prediction), _choice(answer)
    return float(predicted is not None and predicted == expected)


def relaxed(prediction: str, answer: str) -> float:
    """ChartQA's relaxed accuracy: numbers may be off by 5% of the answer, everything else must match exactly.

    A percentage is its number over 100, as in the benchmark. Source: Masry et al. 2022, https://arxiv.org/abs/2203.10244
    """
    predicted, expected = _whole_number(prediction), _whole_number(answer)
    if predicted is None or expected is None:
        return exact_match(prediction, answer)
    return float(abs(predicted - expected) <= 0.05 * abs(expected))


def anls(prediction: str, answer: str) -> float:
    """Average normalised Levenshtein similarity: 1 - distance / longer length, and 0 below one half.

    Source: Biten et al. 2019, https://arxiv.org/abs/1905.13648
    """
    predicted, expected = normalize(prediction), normalize(answer)
    if not predicted or not expected:
        return 0.0
    similarity = 1.0 - _edit_distance(predicted, expected) / max(len(predicted), len(expected))
    return similarity if similarity >= 0.5 else 0.0


def math_equal(prediction: str, answer: str) -> float:
    """1 if the expression in the prediction equals the answer: "0.5", r"\\boxed{1/2}" and r"$\\frac{2}{4}$" do.

    Read and compared by math-verify: an expression in a box comes first, else the last one counts; of an equation its
    right side; 12% equals both 12 and 0.12. The answer is an expression as it stands or has one in dollars or a box.
    What is not an expression must match exactly. In the main thread it gives up after 5 seconds; elsewhere there is no
    limit.
    Source: https://github.com/huggingface/Math-Verify
    """
    from math_verify import parse, verify

    # Its time limit is an alarm signal, which only a main thread can have.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    marked = "$" in answer or "\\boxed" in answer
    expected = parse(answer if marked else f"${answer}$", parsing_timeout=limit)
    equal = verify(expected, parse(prediction, parsing_timeout=limit), timeout_seconds=limit)
    return float(equal) or exact_match(prediction, answer)


SCORE_FUNCTIONS: dict[str, ScoreFunction] = {
    function.__name__: function for function in (exact_match, numeric, multiple_choice, relaxed, anls, math_equal)
}


def score_function(name: str) -> ScoreFunction:
    """A score function by its name here, or the user's own as ``module:function``.

    What is returned gives an empty prediction 0 and checks that every score is in 0-1.

    Raises:
        ScoreError: no such function; also, when called, if it raises, or returns anything but a finite number in 0-1.
    """
    if ":" not in name and name not in SCORE_FUNCTIONS:
        raise ScoreError(f"score function {name!r} is unknown: one of {sorted(SCORE_FUNCTIONS)} or 'module:function'")
    function = SCORE_FUNCTIONS.get(name) or _imported(name)

    @wraps(function)
    def scored(prediction: str, answer: str) -> float:
        if not prediction.strip():
            return 0.0
        try:
            score = function(prediction, answer)
        except Exception as error:
            raise ScoreError(
                f"score function {name!r} raised {type(error).__name__}: {error}, for the prediction {prediction!r} "
                f"and the answer {answer!r}"
            ) from error
        if isinstance(score, bool | int | float) and 0.0 <= score <= 1.0:
            return float(score)
        raise ScoreError(f"score function {name!r} returned {score!r} for {prediction!r}; a score is a number in 0-1")

    return scored


def score_code(name: str) -> list[Path]:
    """The user's code behind a score function ``module:function``: its module, or the folders of the whole package, so
    that helpers beside the function count too. Empty for one of this module or built in.

    Raises:
        ScoreError: there is no such function.
    """
    score_function(name)
    if name in SCORE_FUNCTIONS:
        return []
    found = importlib.util.find_spec(name.partition(":")[0].partition(".")[0])
    return [Path(path) for path in found.submodule_search_locations or [found.origin] if Path(path).exists()]


def _imported(name: str) -> ScoreFunction:
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ScoreError(f"score function {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ScoreError(f"score function {name!r} is a {type(function).__name__}, not a function")
    return function


def _last_number(text: str) -> float | None:
    found = [match for match in _NUMBER.findall(text) if any(character.isdigit() for character in match)]
    return float(found[-1].replace(",", "")) if found else None


def _whole_number(text: str) -> float | None:
    """The number that the whole text is, or None; "1,200", "$5" and "40%" are numbers, "5 apples" is not."""
    match = _WHOLE_NUMBER_TEXT.fullmatch(normalize(text))
    if match is None:
        return None
    try:
        number = float(match["number"].replace(",", ""))
    except ValueError:
        return None
    return number / 100 if match["percent"] else number


def _choice(text: str) -> str | None:
    match = _CHOICE.match(normalize(text))
    return (match["bracketed"] or match["bare"]) if match else None


def _edit_distance(first: str, second: str) -> int:
    previous = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        current = [row]
        for column, right in enumerate(second, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]
