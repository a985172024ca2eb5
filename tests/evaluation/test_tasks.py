"""Local lmms-eval tasks: what goes in comes out of lmms-eval's own loader."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsity_forcing.data.schema import Row
from sparsity_forcing.evaluation.tasks import LocalTask, TaskError, write_tasks
from sparsity_forcing.models.prompts import to_pil
from sparsity_forcing.scoring import ScoreError


def text_rows(*tasks: str) -> list[Row]:
    return [Row(str(place), "test", task, "why?", "so", []) for place, task in enumerate(tasks)]


def test_lmms_eval_loads_what_was_written(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    from lmms_eval.tasks import TaskManager, get_task_dict

    tasks = write_tasks(rows, tmp_path / "tasks", "exact_match", max_new_tokens=9)
    assert {task.label: task.questions for task in tasks} == dict.fromkeys(
        ["read_6x6", "read_8x8", "sum_6x6", "sum_8x8"], 3
    )
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    loaded = get_task_dict([task.name for task in tasks], manager, "chat")
    for task in tasks:
        mine, documents = [row for row in rows if row.label == task.label], loaded[task.name].test_docs()
        assert loaded[task.name].config.generation_kwargs["max_new_tokens"] == 9
        for row, document in zip(mine, documents, strict=True):
            [message] = loaded[task.name].doc_to_messages(document)
            image, text = message["content"]
            assert text == {"type": "text", "text": row.question}
            assert image["url"].tobytes() == to_pil(row.images[0]).tobytes()
            assert loaded[task.name].doc_to_target(document) == row.answer
            assert loaded[task.name].process_results(document, [f" {row.answer}\n"]) == {"accuracy": 1.0}
            assert loaded[task.name].process_results(document, [""]) == {"accuracy": 0.0}


def test_the_score_function_is_the_one_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    from lmms_eval.tasks import TaskManager, get_task_dict

    [task] = write_tasks([replace(text_rows("sums")[0], answer="12")], tmp_path / "tasks", "numeric", 4)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    loaded = get_task_dict([task.name], manager, "chat")[task.name]
    assert loaded.process_results(loaded.test_docs()[0], ["red 7 blue 5 sum 12"]) == {"accuracy": 1.0}
    assert loaded.doc_to_messages(loaded.test_docs()[0])[0]["content"] == [{"type": "text", "text": "why?"}]


def test_the_same_rows_give_the_same_bytes(rows, tmp_path):
    for name in ("first", "second"):
        write_tasks(rows, tmp_path / name, "exact_match", 4)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_limit_takes_the_first_questions_of_every_task(tmp_path):
    tasks = write_tasks(text_rows("b", "a", "b", "b"), tmp_path / "tasks", "exact_match", 4, limit=2)
    assert tasks == (LocalTask("a", "a", 1), LocalTask("b", "b", 2))


def test_the_users_task_names_become_names_lmms_eval_takes(tmp_path):
    [task] = write_tasks(text_rows("chart qa/näh, *"), tmp_path / "tasks", "exact_match", 4)
    assert task == LocalTask("chart_qa_n_h___", "chart qa/näh, *", 1)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows to evaluate"),
        (text_rows("average"), "cannot be called 'average'"),
        (text_rows("a b", "a/b"), "'a b' and 'a/b' would both be called 'a_b'"),
    ],
)
def test_rows_that_cannot_become_tasks_leave_nothing_behind(rows, message, tmp_path):
    with pytest.raises(TaskError, match=message):
        write_tasks(rows, tmp_path / "tasks", "exact_match", 4)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_score_function_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ScoreError, match="'exact'"):
        write_tasks(text_rows("a"), tmp_path / "tasks", "exact", 4)
    assert list(tmp_path.iterdir()) == []
