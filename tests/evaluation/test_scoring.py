"""Score functions by hand-made cases, the known ways to cheat among them."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparsity_forcing.scoring import SCORE_FUNCTIONS, ScoreError, score_code, score_function


def returns_two(prediction: str, answer: str) -> float:
    return 2.0


def returns_nan(prediction: str, answer: str) -> float:
    return math.nan


def breaks(prediction: str, answer: str) -> float:
    return 1 / len(answer)


def always_right(prediction: str, answer: str) -> float:
    return 1.0


not_a_function = "text"


@pytest.mark.parametrize("name", sorted(SCORE_FUNCTIONS))
@pytest.mark.parametrize("prediction", ["", " ", "\n\t"])
@pytest.mark.parametrize("answer", ["7", "", "B", "red"])
def test_an_empty_prediction_scores_zero(name, prediction, answer):
    assert score_function(name)(prediction, answer) == 0.0
    assert SCORE_FUNCTIONS[name](prediction, answer) == 0.0


def test_an_empty_prediction_scores_zero_for_the_users_own_function_too():
    score = score_function(f"{__name__}:always_right")
    assert score("x", "y") == 1.0
    assert score("  ", "y") == 0.0


@pytest.mark.parametrize(
    "name, prediction, answer, expected",
    [
        ("exact_match", "7", "7", 1),
        ("exact_match", " Red  7\nblue 5 sum 12 ", "red 7 blue 5 sum 12", 1),
        ("exact_match", "Yes.", "yes", 1),
        ("exact_match", "STRASSE", "straße", 1),
        ("exact_match", "17", "7", 0),
        ("exact_match", "0 1 2 3 4 5 6 7 8 9", "7", 0),  # says everything: the answer is in the prediction
        ("exact_match", "7", "0 1 2 7", 0),  # the prediction is in the answer
        ("exact_match", ".", "", 0),
        ("numeric", "the sum is 1,204.50 euros", "1204.5", 1),
        ("numeric", "red 7 blue 5 sum 12", "12", 1),
        ("numeric", "12 7", "12", 0),
        ("numeric", "-3", "3", 0),
        ("numeric", "1e3", "1000", 1),
        ("numeric", "twelve", "12", 0),
        ("math_equal", "The answer is $\\frac{2}{4}$.", "\\frac{1}{2}", 1),
        ("math_equal", "0.5", "1/2", 1),
        ("math_equal", "\\boxed{1 + x^2}", "x^2 + 1", 1),
        ("math_equal", "$\\sqrt{8}$", "2\\sqrt{2}", 1),
        ("math_equal", "x^2 + 2", "x^2 + 1", 0),
        ("math_equal", "7", "8", 0),
        ("math_equal", "0 1 2 3 4 5 6 7 8 9", "7", 0),
        ("math_equal", "it is a cat", "7", 0),
        ("math_equal", "it is 0.1", "10%", 1),
        ("math_equal", "12", "so it is $12$", 1),
        ("math_equal", "A Cat", "a cat", 1),
        ("multiple_choice", "B", "b", 1),
        ("multiple_choice", "(B) a cat", "B", 1),
        ("multiple_choice", "B. a cat", "B", 1),
        ("multiple_choice", "The answer is: (C).", "C", 1),
        ("multiple_choice", "A cat sits there", "A", 0),  # an article is no option letter
        ("multiple_choice", "ABCD", "B", 0),
        ("multiple_choice", "A, B, C, D", "A", 0),
        ("relaxed", "104", "100", 1),
        ("relaxed", "105", "100", 1),
        ("relaxed", "106", "100", 0),
        ("relaxed", "0.41", "40%", 1),
        ("relaxed", "0.01", "0", 0),
        ("relaxed", "0", "0", 1),
        ("relaxed", "Blue", "blue", 1),
        ("relaxed", "5 apples", "5", 0),
        ("anls", "kitten", "kitten", 1),
        ("anls", "sitting", "kitten", 4 / 7),
        ("anls", "abc", "xyz", 0),
        ("anls", "abcd", "abxy", 0.5),
    ],
)
def test_hand_made_cases(name, prediction, answer, expected):
    assert score_function(name)(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, message",
    [
        ("exact", "unknown: one of"),
        ("no_such_module_here:score", "cannot be imported"),
        ("math:no_such_function", "cannot be imported"),
        (":score", "cannot be imported"),
        (f"{__name__}:not_a_function", "not a function"),
    ],
)
def test_an_unusable_name_is_an_error_that_names_it(name, message):
    with pytest.raises(ScoreError, match=message) as error:
        score_function(name)
    assert repr(name) in str(error.value)


def test_an_error_of_the_users_function_names_it_and_what_it_was_given():
    with pytest.raises(ScoreError, match=r"test_scoring:breaks' raised ZeroDivisionError: .* the prediction 'x'"):
        score_function(f"{__name__}:breaks")("x", "")


@pytest.mark.parametrize("name", [*SCORE_FUNCTIONS, "sys:intern"])
def test_functions_of_this_package_or_built_in_are_no_code_of_the_user(name):
    assert score_code(name) == []


def test_the_code_of_the_users_function_is_its_file_or_its_whole_package(tmp_path, monkeypatch):
    (tmp_path / "lone_score.py").write_text("def score(said, answer): return 1.0\n")
    package = tmp_path / "package_of_scores"
    (package / "deep").mkdir(parents=True)
    for file in (package / "__init__.py", package / "deep/__init__.py"):
        file.write_text("def score(said, answer): return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score_code("lone_score:score") == [tmp_path / "lone_score.py"]
    assert score_code("package_of_scores.deep:score") == [package]


@pytest.mark.parametrize("function", ["returns_two", "returns_nan"])
def test_a_score_outside_0_to_1_is_an_error(function):
    with pytest.raises(ScoreError, match="a score is a number in 0-1"):
        score_function(f"{__name__}:{function}")("x", "y")


def test_expressions_are_compared_outside_the_main_thread_too():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(score_function("math_equal"), "0.5", "1/2").result() == 1
