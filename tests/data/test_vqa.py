"""VQAv2: metric and normalisation by hand-made cases, and everything that can be wrong with its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infoprune_export.data.vqa import (
    Question,
    normalize_answer,
    open_image,
    read_images,
    read_vqa,
    vqa_accuracy,
    write_vqa,
)
from infoprune_export.errors import InfopruneError

# ── Metric ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        (0, 0.0),
        (1, (1 * 0 + 9 * 1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7 * 1) / 10),
        (4, 1.0),
        (9, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_annotator_out(matches: int, expected: float):
    answers = ["dog"] * matches + [f"cat {i}" for i in range(10 - matches)]
    assert vqa_accuracy("dog", answers) == pytest.approx(expected)
    assert vqa_accuracy("dog", answers[::-1]) == pytest.approx(expected)


def test_vqa_accuracy_of_three_in_ten_is_nine_tenths():
    assert vqa_accuracy("dog", ["dog"] * 3 + ["cat"] * 7) == pytest.approx(0.9)


def test_vqa_accuracy_of_unanimous_answers_is_one_or_zero():
    assert vqa_accuracy("yes", ["yes"] * 10) == 1.0
    assert vqa_accuracy("no", ["yes"] * 10) == 0.0


def test_vqa_accuracy_of_a_single_annotator_is_equality():
    assert vqa_accuracy("Yes.", ["yes"]) == 1.0
    assert vqa_accuracy("no", ["yes"]) == 0.0


def test_vqa_accuracy_normalises_the_prediction():
    assert vqa_accuracy("The Dog.", ["dog"] * 10) == 1.0
    assert vqa_accuracy("Two", ["2"] * 10) == 1.0


def test_vqa_accuracy_strips_punctuation_of_annotators_only_where_they_disagree():
    # as the official script does
    assert vqa_accuracy("hot dog", ["hot-dog"] * 10) == 0.0
    assert vqa_accuracy("hot dog", ["hot-dog"] * 9 + ["sausage"]) == 1.0


def test_vqa_accuracy_of_an_empty_prediction_is_zero():
    assert vqa_accuracy("", ["yes"] * 10) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("  a dog ", "dog"),
        ("The man and an umbrella", "man and umbrella"),
        ("theater", "theater"),
        ("none", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("twenty one", "twenty 1"),
        ("someone", "someone"),
        ("1,000", "1000"),
        ("1,000 dollars (us)", "1000 dollars us"),
        ("hello, world", "hello world"),
        ("hello,world", "hello world"),
        ("red-white", "red white"),
        ("red -white", "red white"),
        ("well -known-ish", "well knownish"),
        ("well- known-ish", "well knownish"),
        ("what?", "what"),
        ("yes!", "yes"),
        ("1/2", "1 2"),
        ('"stop"', "stop"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.a.", "usa"),
        ("p.m", "pm"),
        ("dont", "don't"),
        ("Isnt", "isn't"),
        ("don't", "don't"),
        ("twas", "'twas"),
        ("dog's", "dog's"),
        ("black\nand\twhite", "black and white"),
        ("\tyes\n", "yes"),
        ("yes  no", "yes no"),
        ("the", ""),
        ("", ""),
        ("?", ""),
    ],
)
def test_normalize_answer_follows_the_official_rules(text: str, expected: str):
    assert normalize_answer(text) == expected


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
    assert [list(sample.questions) for sample in samples] == [QUESTIONS[3], QUESTIONS[12]]


def test_written_files_have_the_official_fields(dataset: Path):
    questions = json.loads((dataset / "questions.json").read_text(encoding="utf-8"))["questions"]
    annotations = json.loads((dataset / "annotations.json").read_text(encoding="utf-8"))["annotations"]
    assert [entry["question_id"] for entry in questions] == [entry["question_id"] for entry in annotations]
    assert len({entry["question_id"] for entry in questions}) == 3
    assert annotations[1]["multiple_choice_answer"] == "a"
    assert [answer["answer_id"] for answer in annotations[1]["answers"]] == list(range(1, 11))


def test_read_vqa_keeps_file_order_within_an_image(dataset: Path):
    change(dataset / "questions.json", lambda tree: tree["questions"].reverse())
    assert read(dataset)[0].questions == tuple(QUESTIONS[3][::-1])


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


# ── Images ───────────────────────────────────────────────────────────────────


def test_read_images_lists_every_image_sorted_with_its_prompts(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name in ("z.PNG", "a.jpeg", "b/c.bmp", "notes.txt"):
        save_image(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("x")
    samples = read_images(tmp_path, ("Describe.", "Count."))
    assert [str(sample.image.relative_to(tmp_path)) for sample in samples] == [
        "a.jpeg",
        str(Path("b", "c.bmp")),
        "z.PNG",
    ]
    assert samples[0].questions == (Question("Describe."), Question("Count."))


def test_missing_image_folder_is_named(tmp_path: Path):
    one_line_error(lambda: read_images(tmp_path / "none", ()), tmp_path / "none", "data.images")
    (tmp_path / "file.png").touch()
    one_line_error(lambda: read_images(tmp_path / "file.png", ()), tmp_path / "file.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
def test_open_image_converts_every_mode_to_rgb(tmp_path: Path, mode: str):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (5, 4)).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_missing_image_file_is_named(tmp_path: Path):
    one_line_error(lambda: open_image(tmp_path / "gone.png"), tmp_path / "gone.png")


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file"], ids=["empty", "text"])
def test_text_named_png_is_no_image(tmp_path: Path, content: bytes):
    path = tmp_path / "text.png"
    path.write_bytes(content)
    one_line_error(lambda: open_image(path), path, "not an image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_truncated_image_is_named_wherever_it_ends(tmp_path: Path, suffix: str):
    path = tmp_path / f"cut.{suffix}"
    save_image(path)
    content = path.read_bytes()
    opened = 0
    for length in range(0, len(content) - 24, 3):  # the last bytes of a PNG carry no pixels
        path.write_bytes(content[:length])
        one_line_error(lambda: open_image(path), path)
        opened += 1
    assert opened > 20


def test_png_with_a_wrong_byte_opens_or_is_named(tmp_path: Path):
    path = tmp_path / "flipped.png"
    save_image(path)
    content = path.read_bytes()
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            mode, message = open_image(path).mode, ""
        except InfopruneError as error:
            mode, message = "", str(error)
            refused += 1
        assert mode == "RGB" or (str(path) in message and len(message.splitlines()) == 1)
    assert refused > len(content) / 2


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    one_line_error(lambda: open_image(tmp_path / "large.png"), tmp_path / "large.png", "damaged image")
