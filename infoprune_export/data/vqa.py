"""VQAv2: its files, its answer normalisation, its accuracy.

The question file holds ``questions: [{question_id, image_id, question}]``, the annotation file ``annotations:
[{question_id, image_id, answers: [{answer}, ...], question_type}]``. An image is found by the number its file name ends
in (``COCO_val2014_000000262148.jpg`` is image 262148).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from infoprune_export.errors import InfopruneError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Question:
    """`answers` are the annotators' (ten in VQAv2), empty when there are none; `kind` is the annotation's type."""

    text: str
    answers: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Sample:
    """One image and everything asked about it."""

    image: Path
    questions: tuple[Question, ...]


# ── Reading ──────────────────────────────────────────────────────────────────


def read_vqa(images: Path, questions: Path, annotations: Path) -> list[Sample]:
    """Read a VQAv2 split; images in the order of their ids, questions in file order.

    Raises:
        InfopruneError: a file is missing or not in the format, an image or an annotation is absent.
    """
    answered: dict[Any, tuple[tuple[str, ...], str]] = {}
    for entry in _entries(annotations, "annotations", ("question_id", "answers")):
        try:
            answers = tuple(str(answer["answer"]) for answer in entry["answers"])
        except (TypeError, KeyError):
            raise InfopruneError(
                f"{annotations}: question {entry['question_id']}: answers are not in VQAv2 form"
            ) from None
        if not answers:
            raise InfopruneError(f"{annotations}: question {entry['question_id']} has no answers")
        answered[entry["question_id"]] = (answers, str(entry.get("question_type", "")))
    files = _numbered_images(images)
    by_image: dict[int, list[Question]] = {}
    for entry in _entries(questions, "questions", ("question_id", "image_id", "question")):
        number = entry["image_id"]
        if number not in files:
            raise InfopruneError(f"{images}: no image file ends in number {number}, which {questions.name} asks about")
        if entry["question_id"] not in answered:
            raise InfopruneError(f"{annotations}: no annotation for question {entry['question_id']}")
        answers, kind = answered[entry["question_id"]]
        by_image.setdefault(number, []).append(Question(str(entry["question"]), answers, kind))
    return [Sample(files[number], tuple(asked)) for number, asked in sorted(by_image.items())]


def read_images(folder: Path, prompts: Sequence[str]) -> list[Sample]:
    """Every image below `folder`, sorted by name, each with the same unanswered `prompts`."""
    if not folder.is_dir():
        raise InfopruneError(f"{folder}: no image folder here; set data.images to a folder of photographs")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    return [Sample(path, tuple(Question(prompt) for prompt in prompts)) for path in files]


def open_image(path: Path) -> Image.Image:
    """An image in RGB.

    Raises:
        InfopruneError: missing, truncated, or no image at all.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise InfopruneError(f"{path}: not an image that Pillow can read; remove or convert it") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InfopruneError(f"{path}: damaged image ({error}); remove or replace it") from None


def _entries(path: Path, key: str, required: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InfopruneError(f"{path}: cannot be read ({error.strerror}); name a VQAv2 {key} file") from None
    except (ValueError, RecursionError):
        raise InfopruneError(f"{path}: not valid JSON; name a VQAv2 {key} file") from None
    entries = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise InfopruneError(f"{path}: no list {key!r} in it; this is not a VQAv2 {key} file")
    for number, entry in enumerate(entries):
        for name in required:
            if not isinstance(entry, dict) or name not in entry:
                raise InfopruneError(f"{path}: {key}[{number}] has no {name!r}")
            if name.endswith("_id") and type(entry[name]) is not int:
                raise InfopruneError(f"{path}: {key}[{number}]: {name} is {entry[name]!r:.40}, not a whole number")
        yield entry


def _numbered_images(folder: Path) -> dict[int, Path]:
    numbered = {}
    for sample in read_images(folder, ()):
        if match := re.search(r"(\d+)$", sample.image.stem):
            numbered[int(match.group(1))] = sample.image
    return numbered


# ── Writing ──────────────────────────────────────────────────────────────────


def write_vqa(folder: Path, entries: Sequence[tuple[int, Sequence[Question]]]) -> None:
    """Write ``questions.json`` and ``annotations.json`` for (image id, questions) pairs."""
    questions, annotations = [], []
    for image_id, asked in entries:
        for index, question in enumerate(asked):
            ids = {"question_id": image_id * 1000 + index, "image_id": image_id}
            questions.append({**ids, "question": question.text})
            answers = [
                {"answer": a, "answer_id": i + 1, "answer_confidence": "yes"} for i, a in enumerate(question.answers)
            ]
            most_common = max(question.answers, key=question.answers.count)
            annotations.append(
                {**ids, "question_type": question.kind, "answers": answers, "multiple_choice_answer": most_common}
            )
    for name, content in (("questions", questions), ("annotations", annotations)):
        (folder / f"{name}.json").write_text(json.dumps({name: content}, indent=1) + "\n", encoding="utf-8")


# ── Metric ───────────────────────────────────────────────────────────────────

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {word: str(i) for i, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Answers are typed without apostrophes as often as with; the metric compares the form with.
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll "
    "how's isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't "
    "she'd've should've shouldn't somebody'd somebody'll somebody's someone'd someone'll someone's something'd "
    "something'll that'd that's there'd there're there's they'd they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've "
    "why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
).split()
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED}
_DIGIT_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"\.(?!\d)")


def normalize_answer(text: str) -> str:
    """The official normalisation: white space, punctuation, number words, articles, contractions."""
    text = _strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    """A mark touching a space, or any mark in a text with a number like 1,000, goes; other marks become spaces."""
    stripped = text
    for mark in _PUNCTUATION:
        if f"{mark} " in text or f" {mark}" in text or _DIGIT_COMMA.search(text):
            stripped = stripped.replace(mark, "")
        else:
            stripped = stripped.replace(mark, " ")
    return _LONE_PERIOD.sub("", stripped)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3), averaged over leaving each annotator out; 0..1.

    As in the official script the annotators' answers lose their punctuation only where they disagree.
    """
    predicted = normalize_answer(prediction)
    if len(set(answers)) > 1:
        answers = [_strip_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()) for answer in answers]
    if len(answers) == 1:
        return float(predicted == answers[0])
    matches = [answer == predicted for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(answers)
