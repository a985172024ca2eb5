"""Candidates to splits and quarantine: nothing lost, nothing half-written."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from full_disk import files_at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsity_forcing.data.candidates import BadRow, Candidate, Reason, SplitRule
from sparsity_forcing.data.chat_jsonl import chat_jsonl_candidates
from sparsity_forcing.data.checks import Limits, check_row
from sparsity_forcing.data.images import encode
from sparsity_forcing.data.prepare import DataError, prepare_rows, require_usable
from sparsity_forcing.data.schema import SPLITS, Row, read_rows
from sparsity_forcing.files import replace_directory

RULE = SplitRule(seed=0, validation_share=0.1, test_share=0.2)
LIMITS = Limits(max_question_characters=40)
SEVERAL_DUPLICATES = [json.dumps({"prompt": "q", "completion": "a", "id": "same", "n": n}) for n in range(3)]


def video_question(path: str) -> dict:
    return {"role": "user", "content": [{"type": "video", "video": path}, {"type": "text", "text": "q"}]}


def good(**changes) -> Row:
    return Row(**{"id": "1", "split": "train", "task": "vqa", "question": "q", "answer": "a", "images": []} | changes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"question": " \n"}, Reason.EMPTY_QUESTION),
        ({"answer": ""}, Reason.EMPTY_ANSWER),
        ({"question": "x" * 41}, Reason.QUESTION_TOO_LONG),
        ({"question": "\ud800"}, Reason.UNENCODABLE_TEXT),
        ({"question": "<image>\nwhat?"}, Reason.RESERVED_TOKEN),
        ({"question": "is <|image_pad|> here?"}, Reason.RESERVED_TOKEN),
        ({"id": " "}, Reason.BAD_ID),
        ({"split": "dev"}, Reason.UNKNOWN_SPLIT),
        ({"task": ""}, Reason.UNKNOWN_TASK),
        ({"task": "a/b"}, Reason.UNKNOWN_TASK),
        ({"frames_per_second": float("nan")}, Reason.BAD_NUMBER),
        ({"frames_per_second": float("inf")}, Reason.BAD_NUMBER),
        ({"frames_per_second": 0.0}, Reason.BAD_NUMBER),
        ({"images": [b"GIF89a"]}, Reason.UNREADABLE_IMAGE),
    ],
)
def test_every_source_is_held_to_the_same_checks(changes, reason):
    check_row(good(), LIMITS)
    with pytest.raises(BadRow) as caught:
        check_row(good(**changes), LIMITS)
    assert caught.value.reason is reason


def test_only_the_tasks_that_are_named_are_allowed():
    assert check_row(good(), Limits(40, ("vqa", "ocr"))) == []
    with pytest.raises(BadRow, match="task 'vqa'; one of ocr"):
        check_row(good(), Limits(40, ("ocr",)))


def test_the_split_depends_on_seed_and_images_or_else_on_seed_and_id():
    counts = Counter(RULE(str(i)) for i in range(5000))
    assert counts["test"] == pytest.approx(1000, abs=120)
    assert counts["validation"] == pytest.approx(500, abs=90)
    other = SplitRule(1, 0.1, 0.2)
    assert [RULE(str(i)) for i in range(50)] != [other(str(i)) for i in range(50)]
    for image in range(50):
        assert len({RULE(str(i), [b"first", bytes([image])]) for i in range(20)}) == 1
    assert {RULE("1", [bytes([image])]) for image in range(50)} == set(SPLITS)


any_text = st.text(st.characters(exclude_categories=()), max_size=6)  # halves of characters too: JSON can hold them
images = st.sampled_from([[], ["a.png"], ["cut.png"], ["gone.png"], ["../outside.png"], ["x" * 300 + ".png"]])
lines = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"prompt": st.text(max_size=50) | any_text, "completion": any_text},
            optional={
                "images": images,
                "id": st.none() | st.integers(0, 5) | any_text,
                "split": st.sampled_from(["test", "dev"]),
                "frames_per_second": st.none() | st.floats(0, 5) | st.sampled_from([10**400, -1]),
                "source": any_text | st.dictionaries(any_text, any_text, max_size=2),
            },
        ).map(json.dumps),
        st.sampled_from(["gone.mp4", "x" * 300 + ".mp4", "\ud800.mp4", "text.png"]).map(
            lambda path: json.dumps({"prompt": [video_question(path)], "completion": "a"})
        ),
        st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=10),
        st.sampled_from(['{"prompt": NaN}', "{}", "[]", *SEVERAL_DUPLICATES]),
    ),
    max_size=12,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines)
def test_every_line_ends_in_a_split_or_in_quarantine(folder, lines):
    path, prepared, quarantine = folder / "rows.jsonl", folder / "prepared", folder / "quarantine.parquet"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    taken = list(chat_jsonl_candidates(path, RULE, 4))
    with replace_directory(prepared) as directory:
        summary = prepare_rows(iter(taken), LIMITS, directory, quarantine)

    rows = [row for split in SPLITS for row in read_rows(prepared / f"{split}.parquet")]
    rejected = pq.read_table(quarantine).to_pylist()
    assert len(rows) + len(rejected) == len(taken) == summary.rows_in
    assert len(taken) == sum(bool(line.encode().strip()) for line in lines)
    assert len({row.id for row in rows}) == len(rows)
    assert {record["line"] for record in rejected} <= {candidate.line for candidate in taken}
    by_line = {candidate.line: candidate for candidate in taken}
    for record in rejected:
        assert record["raw"] == by_line[record["line"]].raw
        assert record["detail"]
    kept = {candidate.line for candidate in taken} - {record["line"] for record in rejected}
    assert sorted(row.id for row in rows) == sorted(by_line[line].row.id for line in kept)


def prepared_from(rows, tmp_path, limits=LIMITS):
    candidates = (Candidate("rows", place, f"raw {place}", row) for place, row in enumerate(rows, start=1))
    with replace_directory(tmp_path / "prepared") as directory:
        return prepare_rows(candidates, limits, directory, tmp_path / "quarantine.parquet")


def test_of_two_rows_with_one_id_the_first_good_one_stays(tmp_path):
    rows = [good(question=""), good(question="second"), good(question="third"), good(id="2")]
    summary = prepared_from(rows, tmp_path)
    assert [row.question for row in read_rows(tmp_path / "prepared/train.parquet")] == ["second", "q"]
    assert summary.reasons == {"empty_question": 1, "duplicate_id": 1}
    rejected = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert [(record["line"], record["reason"]) for record in rejected] == [(1, "empty_question"), (3, "duplicate_id")]


def test_a_second_run_gives_the_same_bytes(tmp_path, png):
    rows = [good(id=str(i), images=[png], split=SPLITS[i % 3], question="q" if i % 5 else "") for i in range(40)]
    outputs = []
    for name in ("first", "second"):
        prepared_from(rows, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        outputs.append([(path.name, path.read_bytes()) for path in files])
    assert outputs[0] == outputs[1]
    assert [name for name, _ in outputs[0]] == [
        *("test.parquet", "train.parquet", "validation.parquet"),
        "quarantine.parquet",
    ]


def test_too_many_bad_rows_are_an_error_with_counts(tmp_path):
    rows = [good(id=str(i), split=SPLITS[i % 3]) for i in range(9)] + [good(answer=""), good(question="")]
    summary = prepared_from(rows, tmp_path)
    require_usable(summary, 0.2, tmp_path / "quarantine.parquet")
    with pytest.raises(
        DataError, match=r"2 of 11 rows are in quarantine \(18\.2%, .* 5\.0%\): empty_\w+ 1, empty_\w+ 1"
    ):
        require_usable(summary, 0.05, tmp_path / "quarantine.parquet")


def test_no_rows_and_empty_splits_are_errors(tmp_path):
    with pytest.raises(DataError, match="holds no rows"):
        require_usable(prepared_from([], tmp_path), 0.05, tmp_path / "quarantine.parquet")
    with pytest.raises(DataError, match=r"no rows in split\(s\) validation, test"):
        require_usable(prepared_from([good()], tmp_path), 0.05, tmp_path / "quarantine.parquet")


def test_metrics_count_what_is_there(tmp_path, png):
    rows = [good(id="1", images=[png, png]), good(id="2", split="test", task="ocr"), good(id="3", answer="")]
    metrics = prepared_from(rows, tmp_path).metrics()
    assert metrics["rows_in"] == 3
    assert metrics["rows"]["train"] == {"total": 1, "tasks": {"vqa": 1}, "image_bytes": 2 * len(png)}
    assert metrics["rows"]["validation"]["total"] == 0
    assert metrics["quarantined"] == {"total": 1, "fraction": 1 / 3, "reasons": {"empty_answer": 1}}
    assert metrics["images"] == {
        "count": 2,
        "width": {"min": 24, "median": 24, "max": 24},
        "height": {"min": 16, "median": 16, "max": 16},
    }


def noise(seed: int) -> bytes:
    """A PNG that does not compress, another one for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "PNG")


def test_a_full_disk_leaves_the_old_splits(tmp_path):
    prepared_from([good()], tmp_path)
    before = (tmp_path / "prepared/train.parquet").read_bytes()
    many = [good(id=str(i), images=[noise(i)]) for i in range(400)]
    with files_at_most(100_000), pytest.raises(OSError, match="File too large") as caught:
        prepared_from(many, tmp_path)
    assert "is as it was before" in " ".join(caught.value.__notes__)
    assert (tmp_path / "prepared/train.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared", "quarantine.parquet"]
