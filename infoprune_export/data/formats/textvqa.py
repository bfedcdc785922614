"""TextVQA: ``TextVQA_0.5.1_val.json`` and a folder of images by their ids.

``data: [{question_id, image_id, question, answers: [ten texts], image_classes}]``; image ``003a8ae2ef43b901`` is file
``003a8ae2ef43b901.jpg``. Scored with EvalAI's normalisation of both sides. LLaVA's published figure gives reference OCR
tokens in the prompt; ours does with ``data.ocr_tokens`` only, from ``TextVQA_Rosetta_OCR_v0.2_val.json``
(``data: [{image_id, ocr_tokens}]``), and the two are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    field,
    grouped,
    image_at,
    overall,
    read_json,
    unique,
)
from infoprune_export.data.metrics.vqa import evalai_accuracy
from infoprune_export.data.samples import Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

_WHAT = "TextVQA_0.5.1_val.json"
_WHAT_OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"


def read(spec: DataSpec) -> list[Sample]:
    """Read a split."""
    images, path = Path(spec.images or ""), Path(spec.questions or "")
    tokens = _read_tokens(Path(spec.annotations)) if spec.annotations is not None else {}
    entries = entries_of(read_json(path, _WHAT), path, "data", _WHAT)
    pairs = []
    for number, entry in enumerate(entries):
        where = f"{path}: data[{number}]"
        image = field(entry, "image_id", str, where)
        if spec.ocr_tokens and image not in tokens:
            raise InfopruneError(f"{spec.annotations}: no OCR tokens for image {image}, which {path.name} asks about")
        pairs.append((image_at(images, f"{image}.jpg", where), _question(entry, tokens.get(image, ()), spec, where)))
    unique((question.id for _, question in pairs), path)
    return grouped(pairs)


def _read_tokens(path: Path) -> dict[str, tuple[str, ...]]:
    found = {}
    for number, entry in enumerate(entries_of(read_json(path, _WHAT_OCR), path, "data", _WHAT_OCR)):
        where = f"{path}: data[{number}]"
        found[field(entry, "image_id", str, where)] = tuple(map(str, field(entry, "ocr_tokens", list, where)))
    return found


def _question(entry: Mapping[str, Any], tokens: Sequence[str], spec: DataSpec, where: str) -> Question:
    text = str(field(entry, "question", str, where))
    if spec.ocr_tokens:
        text = f"{text}\nReference OCR token: {', '.join(tokens)}"
    question_id = str(field(entry, "question_id", (int, str), where))
    answers = annotators(field(entry, "answers", list, where), where)
    return Question(asked(text, spec, SHORT_ANSWER), answers, id=question_id)


def _from_row(row: Mapping[str, Any], spec: DataSpec) -> tuple[str, Question]:
    tokens = row["ocr_tokens"] if spec.ocr_tokens else ()
    return str(row["image_id"]), _question(row, tokens, spec, f"question {row['question_id']}")


TEXTVQA = Format(
    name="textvqa",
    metric="VQA accuracy, EvalAI's normalisation",
    instruction=SHORT_ANSWER,
    read=read,
    score=each(lambda question, text: evalai_accuracy(text, question.answers)),
    figures=overall,
    hub=HubSource("validation", _from_row),
)
