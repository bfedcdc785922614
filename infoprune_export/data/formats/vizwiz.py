"""VizWiz-VQA: ``val.json`` and a folder of images.

``[{image, question, answers: [{answer, answer_confidence}], answer_type, answerable}]``. LLaVA's figure is of the test
server, whose answers are not public; lmms-eval's is of val. Scored with EvalAI's normalisation of both sides, in which
"unanswerable" is an answer as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infoprune_export.data.formats.base import (
    SHORT_ANSWER,
    Format,
    HubSource,
    Scores,
    annotators,
    asked,
    by_name,
    each,
    entries_of,
    field,
    grouped,
    image_at,
    percent,
    read_json,
    unique,
)
from infoprune_export.data.metrics.vqa import evalai_accuracy, normalize_evalai
from infoprune_export.data.samples import Question, Sample
from infoprune_export.recipe import DataSpec

_WHAT = "VizWiz's val.json"
UNANSWERABLE = "unanswerable"
_INSTRUCTION = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT_ANSWER}"


def read(spec: DataSpec) -> list[Sample]:
    """Read a split."""
    images, path = Path(spec.images or ""), Path(spec.questions or "")
    pairs = []
    for number, entry in enumerate(entries_of(read_json(path, _WHAT), path, "", _WHAT)):
        where = f"{path}: entry {number}"
        name = field(entry, "image", str, where)
        answers = annotators(field(entry, "answers", list, where), where, "answer")
        text = asked(field(entry, "question", str, where), spec, _INSTRUCTION)
        question = Question(text, answers, str(entry.get("answer_type", "")), name)
        pairs.append((image_at(images, name, where), question))
    unique((question.id for _, question in pairs), path)
    return grouped(pairs)


def figures(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """Accuracy, accuracy by answer type, and how often the model says that it cannot be answered."""
    refused = sum(normalize_evalai(text) == UNANSWERABLE for text in answers)
    types = {f"type/{name}": value for name, value in by_name([q.kind for q in questions], scores).items()}
    return {"accuracy": percent(scores), "said_unanswerable": 100 * refused / len(answers), **types}


def _from_row(row: Mapping[str, Any], spec: DataSpec) -> tuple[str, Question]:
    answers = annotators(row["answers"], f"question {row['question_id']}")
    text = asked(row["question"], spec, _INSTRUCTION)
    return str(row["question_id"]), Question(text, answers, str(row.get("category") or ""), str(row["question_id"]))


VIZWIZ = Format(
    name="vizwiz",
    metric="VQA accuracy, EvalAI's normalisation",
    instruction=_INSTRUCTION,
    read=read,
    score=each(lambda question, text: evalai_accuracy(text, question.answers)),
    figures=figures,
    hub=HubSource("val", _from_row),
)
