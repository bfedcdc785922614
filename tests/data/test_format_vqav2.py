"""VQAv2's files: round trip, and everything that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infoprune_export.data.formats.vqav2 import read_vqa, write_vqa
from infoprune_export.data.samples import Question, Sample
from infoprune_export.errors import InfopruneError

# ── Round trip ───────────────────────────────────────────────────────────────

QUESTIONS = {
    3: [Question("Which?", ("a",) * 9 + ("b",), "color"), Question("Wie groß?", ("ü",) * 10, "count")],
    12: [Question("Is it?", ("no",) * 10)],
}


def save_image(path: Path, size: int = 12) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """``images/`` with numbers 3, 12 and 99, and the two JSON files that ask about 12, then 3."""
    (tmp_path / "images").mkdir()
    for name in ("COCO_val2014_000000000003.png", "12.jpg", "unasked_99.png"):
        save_image(tmp_path / "images" / name)
    write_vqa(tmp_path, [(12, QUESTIONS[12]), (3, QUESTIONS[3])])
    return tmp_path


def read(folder: Path):
    return read_vqa(folder / "images", folder / "questions.json", folder / "annotations.json")


def asked(sample: Sample) -> list[Question]:
    """The sample's questions without their ids."""
    return [replace(question, id="") for question in sample.questions]


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(edit(tree) or tree), encoding="utf-8")


def one_line_error(action: Callable[[], object], *mentions: object) -> None:
    """`action` raises `InfopruneError` in one line that mentions all of these."""
    with pytest.raises(InfopruneError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for mention in mentions:
        assert str(mention) in message


def test_written_questions_are_read_back_in_order_of_image_number(dataset: Path):
    samples = read(dataset)
    assert [sample.image.name for sample in samples] == ["COCO_val2014_000000000003.png", "12.jpg"]
    assert [asked(sample) for sample in samples] == [QUESTIONS[3], QUESTIONS[12]]
    assert [question.id for sample in samples for question in sample.questions] == ["3000", "3001", "12000"]


def test_written_files_have_the_official_fields(dataset: Path):
    questions = json.loads((dataset / "questions.json").read_text(encoding="utf-8"))["questions"]
    annotations = json.loads((dataset / "annotations.json").read_text(encoding="utf-8"))["annotations"]
    assert [entry["question_id"] for entry in questions] == [entry["question_id"] for entry in annotations]
    assert len({entry["question_id"] for entry in questions}) == 3
    assert annotations[1]["multiple_choice_answer"] == "a"
    assert [answer["answer_id"] for answer in annotations[1]["answers"]] == list(range(1, 11))


def test_read_vqa_keeps_file_order_within_an_image(dataset: Path):
    change(dataset / "questions.json", lambda tree: tree["questions"].reverse())
    assert asked(read(dataset)[0]) == QUESTIONS[3][::-1]


def test_read_vqa_finds_images_in_subfolders(dataset: Path):
    (dataset / "images" / "more").mkdir()
    (dataset / "images" / "12.jpg").rename(dataset / "images" / "more" / "12.jpg")
    assert read(dataset)[1].image == dataset / "images" / "more" / "12.jpg"


# ── Broken files ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["questions", "annotations"])
def test_missing_json_file_is_named(dataset: Path, name: str):
    (dataset / f"{name}.json").unlink()
    one_line_error(lambda: read(dataset), dataset / f"{name}.json", f"VQAv2 {name} file")


@pytest.mark.parametrize("name", ["questions", "annotations"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000], ids=["empty", "cut", "binary", "deep"]
)
def test_invalid_json_is_named(dataset: Path, name: str, content: bytes):
    (dataset / f"{name}.json").write_bytes(content)
    one_line_error(lambda: read(dataset), dataset / f"{name}.json", "not valid JSON")


@pytest.mark.parametrize("name", ["questions", "annotations"])
@pytest.mark.parametrize("tree", [[], {}, 7, None, {"questions": {}, "annotations": "x"}])
def test_json_of_another_structure_is_named(dataset: Path, name: str, tree: Any):
    (dataset / f"{name}.json").write_text(json.dumps(tree))
    one_line_error(lambda: read(dataset), dataset / f"{name}.json", f"VQAv2 {name} file")


def test_swapped_files_are_noticed(dataset: Path):
    swapped = (dataset / "images", dataset / "annotations.json", dataset / "questions.json")
    one_line_error(lambda: read_vqa(*swapped), dataset / "questions.json")


@pytest.mark.parametrize("entry", [7, None, "x", {"question_id": 12000}])
def test_malformed_question_is_named_by_number(dataset: Path, entry: Any):
    change(dataset / "questions.json", lambda tree: tree["questions"].__setitem__(1, entry))
    one_line_error(lambda: read(dataset), dataset / "questions.json", "questions[1]")


@pytest.mark.parametrize("answers", [5, None, ["yes"], [{"text": "yes"}], "yes"])
def test_malformed_answers_are_named_by_question(dataset: Path, answers: Any):
    change(dataset / "annotations.json", lambda tree: tree["annotations"][0].__setitem__("answers", answers))
    one_line_error(lambda: read(dataset), dataset / "annotations.json", "12000")


def test_question_without_answers_is_named(dataset: Path):
    change(dataset / "annotations.json", lambda tree: tree["annotations"][0].__setitem__("answers", []))
    one_line_error(lambda: read(dataset), dataset / "annotations.json", "12000", "no answers")


@pytest.mark.parametrize(
    ("name", "key"), [("questions", "image_id"), ("questions", "question_id"), ("annotations", "question_id")]
)
@pytest.mark.parametrize("value", [[1], {"a": 1}], ids=["list", "object"])
def test_identifier_that_is_no_number_is_refused(dataset: Path, name: str, key: str, value: Any):
    change(dataset / f"{name}.json", lambda tree: tree[name][0].__setitem__(key, value))
    one_line_error(lambda: read(dataset), dataset)


def test_missing_annotation_is_named(dataset: Path):
    change(dataset / "annotations.json", lambda tree: tree["annotations"].__delitem__(0))
    one_line_error(lambda: read(dataset), dataset / "annotations.json", "no annotation for question 12000")


def test_missing_image_is_named(dataset: Path):
    (dataset / "images" / "12.jpg").unlink()
    one_line_error(lambda: read(dataset), dataset / "images", "12", "questions.json")


def test_image_of_another_suffix_does_not_count(dataset: Path):
    (dataset / "images" / "12.jpg").rename(dataset / "images" / "12.txt")
    one_line_error(lambda: read(dataset), dataset / "images", "12")
