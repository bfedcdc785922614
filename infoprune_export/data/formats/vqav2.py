"""VQAv2: its two files, its accuracy.

The question file holds ``questions: [{question_id, image_id, question}]``, the annotation file ``annotations:
[{question_id, image_id, answers: [{answer}, ...], question_type, answer_type}]``. An image is found by the number its
file name ends in (``COCO_val2014_000000262148.jpg`` is image 262148).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infoprune_export.data.formats.base import (
    SHORT_ANSWER,
    Format,
    HubSource,
    annotators,
    asked,
    each,
    entries_of,
    only_image,
    overall,
    read_json,
)
from infoprune_export.data.metrics.vqa import vqa_accuracy
from infoprune_export.data.samples import Question, Sample, image_files
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

# ── Reading ──────────────────────────────────────────────────────────────────


def read(spec: DataSpec) -> list[Sample]:
    """The split that a recipe's data section names."""
    return read_vqa(Path(spec.images or ""), Path(spec.questions or ""), Path(spec.annotations or ""), spec)


def read_vqa(images: Path, questions: Path, annotations: Path, spec: DataSpec | None = None) -> list[Sample]:
    """Read a VQAv2 split; images in the order of their ids, questions in file order.

    Raises:
        InfopruneError: a file is missing or not in the format, an image or an annotation is absent.
    """
    spec = spec or DataSpec()
    answered: dict[int, tuple[tuple[str, ...], str]] = {}
    for entry in _entries(annotations, "annotations", ("question_id", "answers")):
        where = f"{annotations}: question {entry['question_id']}"
        if entry["question_id"] in answered:
            raise InfopruneError(f"{where} is annotated twice; keep one of the two")
        answers = annotators(entry["answers"], where, "answer")
        answered[entry["question_id"]] = (answers, str(entry.get("question_type", "")))
    files = _numbered_images(images)
    by_image: dict[int, list[Question]] = {}
    seen: set[int] = set()
    for entry in _entries(questions, "questions", ("question_id", "image_id", "question")):
        number, question_id = entry["image_id"], entry["question_id"]
        if question_id in seen:
            raise InfopruneError(f"{questions}: question {question_id} is there twice; keep one of the two")
        seen.add(question_id)
        if number not in files:
            raise InfopruneError(f"{images}: no image file ends in number {number}, which {questions.name} asks about")
        only_image(files[number], images, str(number), questions.name)
        if question_id not in answered:
            raise InfopruneError(f"{annotations}: no annotation for question {question_id}")
        answers, kind = answered[question_id]
        text = asked(str(entry["question"]), spec, SHORT_ANSWER)
        by_image.setdefault(number, []).append(Question(text, answers, kind, str(question_id)))
    return [Sample(files[number][0], tuple(about)) for number, about in sorted(by_image.items())]


def _entries(path: Path, key: str, required: Sequence[str]) -> Iterator[dict[str, Any]]:
    what = f"a VQAv2 {key} file"
    for number, entry in enumerate(entries_of(read_json(path, what), path, key, what)):
        for name in required:
            if not isinstance(entry, dict) or name not in entry:
                raise InfopruneError(f"{path}: {key}[{number}] has no {name!r}")
            if name.endswith("_id") and type(entry[name]) is not int:
                raise InfopruneError(f"{path}: {key}[{number}]: {name} is {entry[name]!r:.40}, not a whole number")
        yield entry


def _numbered_images(folder: Path) -> dict[int, list[Path]]:
    numbered: dict[int, list[Path]] = {}
    for path in image_files(folder):
        if match := re.search(r"(\d+)$", path.stem):
            numbered.setdefault(int(match.group(1)), []).append(path)
    return numbered


def _from_row(row: Mapping[str, Any], spec: DataSpec) -> tuple[str, Question]:
    answers = annotators(row["answers"], f"question {row['question_id']}", "answer")
    text = asked(row["question"], spec, SHORT_ANSWER)
    return str(row["image_id"]), Question(text, answers, row["question_type"], str(row["question_id"]))


# ── Writing ──────────────────────────────────────────────────────────────────


def write_vqa(folder: Path, entries: Sequence[tuple[int, Sequence[Question]]]) -> None:
    """Write ``questions.json`` and ``annotations.json`` for (image id, questions) pairs."""
    questions, annotations = [], []
    for image_id, about in entries:
        for index, question in enumerate(about):
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


VQAV2 = Format(
    name="vqav2",
    metric="VQA accuracy",
    instruction=SHORT_ANSWER,
    read=read,
    score=each(lambda question, text: vqa_accuracy(text, question.answers)),
    figures=overall,
    hub=HubSource("validation", _from_row),
)
