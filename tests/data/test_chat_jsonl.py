"""The user's conversations: both TRL forms, and every way a line can be wrong."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageFile

from sparsity_forcing.data.candidates import BadRow, Reason, SplitRule
from sparsity_forcing.data.chat_jsonl import chat_jsonl_candidates, parse_line
from sparsity_forcing.data.images import decode, read_image
from sparsity_forcing.data.schema import Row
from sparsity_forcing.models.prompts import to_pil

RULE = SplitRule(seed=0, validation_share=0.1, test_share=0.2)
IMAGE, TEXT = {"type": "image", "image": "a.png"}, {"type": "text", "text": "what is it?"}


def parse(values, folder) -> Row:
    line = values if isinstance(values, bytes) else json.dumps(values).encode()
    return parse_line(line, folder, RULE, max_video_frames=4)


def chat(content, answer="a cat", **more):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


@pytest.mark.parametrize(
    "values",
    [
        chat([IMAGE, TEXT]),
        chat([{"type": "image", "path": "a.png"}, TEXT]),
        chat([{"type": "image"}, TEXT], images=["a.png"]),
        chat("what is it?", images=["a.png"]),
        chat([IMAGE, TEXT], answer=[{"type": "text", "text": "a cat"}]),
        {"prompt": " what is it? ", "completion": "a cat\n", "images": ["a.png"]},
        {"prompt": [{"role": "user", "content": [IMAGE, TEXT]}], "completion": "a cat"},
        {
            "prompt": [{"role": "user", "content": [IMAGE, TEXT]}],
            "completion": [{"role": "assistant", "content": "a cat"}],
        },
    ],
)
def test_both_forms_give_the_same_row(values, folder, png):
    row = parse(values, folder)
    assert (row.question, row.answer, row.images, row.task) == ("what is it?", "a cat", [png], "user")


def test_optional_keys_are_taken_and_others_go_to_meta(folder):
    row = parse(chat("q", id=7, split="test", task="vqa", source="x", frames_per_second=2), folder)
    assert (row.id, row.split, row.task, row.frames_per_second) == ("7", "test", "vqa", 2.0)
    assert row.meta == {"source": "x"}
    assert row.images == []


def test_several_images_keep_their_order(folder):
    row = parse(chat([{"type": "image"}, IMAGE, {"type": "image"}, TEXT], images=["b.jpg", "c.webp"]), folder)
    assert [Image.open(io.BytesIO(image)).format for image in row.images] == ["JPEG", "PNG", "PNG"]
    assert row.images[0] == (folder / "b.jpg").read_bytes()


def test_an_absolute_path_may_lead_into_the_files_folder(folder, png):
    row = parse(chat([{"type": "image", "image": str(folder / "a.png")}, TEXT]), folder)
    assert row.images == [png]
    with pytest.raises(BadRow, match=r"path_outside.*where DVC would not see it change"):
        parse(chat([{"type": "image", "image": str(folder.parent / "outside.png")}, TEXT]), folder)


def test_questions_about_one_image_are_in_one_split(folder):
    def split(number: int, image: str) -> str:
        return parse(chat(f"question {number}?", images=[image], id=number), folder).split

    assert {split(number, "a.png") for number in range(30)} == {split(0, "a.png")}
    assert len({parse(chat(f"question {number}?"), folder).split for number in range(30)}) > 1


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_a_cut_image_does_not_pass_even_where_another_library_lets_pillow_fill_it_up(folder, monkeypatch, name):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadRow, match="unreadable_image"):
        read_image(folder / name)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_an_image_is_upright_whatever_its_format(folder):
    turned, exif = Image.new("RGB", (80, 40)), Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    for name in ("turned.jpg", "turned.png", "turned.webp"):
        turned.save(folder / name, exif=exif)
        image = read_image(folder / name)
        assert decode(image).size == to_pil(image).size == (40, 80)


def test_an_identical_line_has_the_same_id(folder):
    assert parse(chat("q"), folder).id == parse(chat("q"), folder).id != parse(chat("other"), folder).id


def write_video(path, frames=30, rate=10):
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (32, 32))
    for i in range(frames):
        writer.write(np.full((32, 32, 3), i * 8, np.uint8))
    writer.release()


def test_a_video_becomes_evenly_spaced_frames(folder):
    pytest.importorskip("decord")
    pytest.importorskip("cv2")
    write_video(folder / "clip.mp4")
    row = parse(chat([{"type": "video", "video": "clip.mp4"}, TEXT]), folder)
    brightness = [np.asarray(Image.open(io.BytesIO(frame))).mean() for frame in row.images]
    assert np.allclose(brightness, [0, 80, 152, 232], atol=12)  # frames 0, 10, 19, 29
    assert row.frames_per_second == pytest.approx(4 / 3)  # 4 of 3 seconds
    with pytest.raises(BadRow, match="unsupported_content"):
        parse(chat([{"type": "video", "video": "clip.mp4"}, IMAGE, TEXT]), folder)


@pytest.mark.parametrize(
    "values, reason, detail",
    [
        (b'{"messages": [', Reason.MALFORMED_JSON, "Expecting value"),
        (b'["a"]', Reason.MALFORMED_JSON, "is a list"),
        (b'{"prompt": "\xff", "completion": "a"}', Reason.MALFORMED_JSON, "not UTF-8"),
        (b'{"prompt": "q", "completion": "a", "x": NaN}', Reason.MALFORMED_JSON, "NaN is not a JSON number"),
        (b'{"prompt": "q", "completion": "a", "x": 1e999}', Reason.MALFORMED_JSON, "too large"),
        (b"[" * 100_000, Reason.MALFORMED_JSON, "recursion"),
        ({"question": "q"}, Reason.UNSUPPORTED_CONVERSATION, "needs 'messages'"),
        ({"messages": "q"}, Reason.UNSUPPORTED_CONVERSATION, "list of objects"),
        ({"messages": []}, Reason.UNSUPPORTED_CONVERSATION, "one question and its answer"),
        ({"prompt": 5, "completion": "a"}, Reason.UNSUPPORTED_CONTENT, "prompt must be text or a list of messages"),
        ({"prompt": "q", "completion": 3}, Reason.UNSUPPORTED_CONTENT, "completion must be text or a list of messages"),
        (
            {"messages": [{"role": "system", "content": "be good"}, *chat("q")["messages"]]},
            Reason.UNSUPPORTED_ROLE,
            "role 'system'",
        ),
        ({"messages": chat("q")["messages"] * 2}, Reason.UNSUPPORTED_CONVERSATION, "one question"),
        (chat([{"type": "audio", "audio": "a.wav"}]), Reason.UNSUPPORTED_CONTENT, "'audio'"),
        (chat([{"type": "image", "image": 5}]), Reason.UNSUPPORTED_CONTENT, "must be a path, got int"),
        (chat("q", answer=[IMAGE]), Reason.UNSUPPORTED_CONTENT, "assistant"),
        (chat([{"type": "image"}, TEXT]), Reason.IMAGE_COUNT, "1 image part"),
        (chat([IMAGE, TEXT], images=["b.jpg"]), Reason.IMAGE_COUNT, "1 path"),
        (chat("q", images="a.png"), Reason.UNSUPPORTED_CONTENT, "list of paths"),
        (chat("q", images=["nowhere.png"]), Reason.MISSING_IMAGE, "No such file"),
        (chat("q", images=["."]), Reason.MISSING_IMAGE, "directory"),
        (chat("q", images=["a\0.png"]), Reason.MISSING_IMAGE, "null"),
        (chat("q", images=["https://example.org/a.png"]), Reason.MISSING_IMAGE, "nothing is downloaded"),
        (chat("q", images=["../outside.png"]), Reason.PATH_OUTSIDE, "out of the file's folder"),
        (chat("q", images=["link.png"]), Reason.PATH_OUTSIDE, "out of the file's folder"),
        (chat("q", images=["cut.png"]), Reason.UNREADABLE_IMAGE, "OSError"),
        (chat("q", images=["cut.jpg"]), Reason.UNREADABLE_IMAGE, "truncated"),
        (chat("q", images=["text.png"]), Reason.UNREADABLE_IMAGE, "UnidentifiedImageError"),
        (chat("q", images=["empty.png"]), Reason.UNREADABLE_IMAGE, "UnidentifiedImageError"),
        (chat("q", images=["thin.png"]), Reason.UNREADABLE_IMAGE, "too thin"),
        (chat([{"type": "video", "video": "gone.mp4"}]), Reason.MISSING_IMAGE, "no such video"),
        (chat([{"type": "video", "video": "text.png"}]), Reason.UNREADABLE_VIDEO, "text.png"),
        (chat("q", id=True), Reason.BAD_ID, "id True"),
        (chat("q", split=1), Reason.UNKNOWN_SPLIT, "split 1"),
        (chat("q", task=["vqa"]), Reason.UNKNOWN_TASK, "is not text"),
        (chat("q", frames_per_second="2"), Reason.BAD_NUMBER, "'2' is not a number"),
        (chat("q", frames_per_second=10**400), Reason.BAD_NUMBER, "too large"),
        (chat("q", id="\ud800"), Reason.UNENCODABLE_TEXT, "'id' holds half a character"),
        (chat("q", note={"deep": ["\udfff"]}), Reason.UNENCODABLE_TEXT, "'note' holds half a character"),
        (chat("q", **{"\ud800": 1}), Reason.UNENCODABLE_TEXT, "holds half a character"),
        (chat("q", images=["x" * 300]), Reason.MISSING_IMAGE, "too long"),
        (chat([{"type": "video", "video": "x" * 300}]), Reason.MISSING_IMAGE, "too long"),
    ],
)
def test_bad_lines_name_their_reason(values, reason, detail, folder):
    if reason is Reason.UNREADABLE_VIDEO:
        pytest.importorskip("decord")
    with pytest.raises(BadRow) as caught:
        parse(values, folder)
    assert caught.value.reason is reason
    assert detail in caught.value.detail


def test_lines_are_numbered_as_an_editor_does(folder):
    lines = [json.dumps(chat("first")), "", "   ", "broken", json.dumps(chat("second"))]
    path = folder / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = list(chat_jsonl_candidates(path, RULE, 4))
    assert [candidate.line for candidate in found] == [1, 4, 5]
    assert [isinstance(candidate.row, Row) for candidate in found] == [True, False, True]
    assert found[1].raw == "broken"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl does not exist; data\.user\.path"):
        list(chat_jsonl_candidates(tmp_path / "rows.jsonl", RULE, 4))
