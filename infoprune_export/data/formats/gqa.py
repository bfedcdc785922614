"""GQA: ``testdev_balanced_questions.json`` and a folder of images by their ids.

``{question id: {imageId, question, answer, isBalanced, types: {structural, semantic, detailed}}}``; image ``n161313``
is file ``n161313.jpg``. Exact match. Questions that are not balanced are left out, as the official script does; binary
are those whose structural type is not query.
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
    asked,
    by_name,
    each,
    field,
    grouped,
    image_at,
    percent,
    read_json,
)
from infoprune_export.data.metrics.exact import gqa_match
from infoprune_export.data.samples import Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

_WHAT = "testdev_balanced_questions.json"


def read(spec: DataSpec) -> list[Sample]:
    """Read a split."""
    images, path = Path(spec.images or ""), Path(spec.questions or "")
    tree = read_json(path, _WHAT)
    if not isinstance(tree, dict) or not tree:
        raise InfopruneError(f"{path}: holds no questions by their ids; this is not {_WHAT}")
    pairs = []
    for question_id, entry in tree.items():
        where = f"{path}: question {question_id}"
        question = _question(question_id, entry, spec, where)
        if entry.get("isBalanced", True):
            pairs.append((image_at(images, f"{field(entry, 'imageId', str, where)}.jpg", where), question))
    if not pairs:
        raise InfopruneError(f"{path}: none of its {len(tree)} questions is balanced; name {_WHAT}")
    return grouped(pairs)


def _question(question_id: str, entry: Any, spec: DataSpec, where: str) -> Question:
    text = asked(field(entry, "question", str, where), spec, SHORT_ANSWER)
    kind = field(field(entry, "types", dict, where), "structural", str, f"{where}: types")
    return Question(text, (field(entry, "answer", str, where),), kind, question_id)


def figures(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """Accuracy of all questions, of the open and of the binary ones."""
    parts = by_name(["open" if question.kind == "query" else "binary" for question in questions], scores)
    return {"accuracy": percent(scores), **parts}


def _from_row(row: Mapping[str, Any], spec: DataSpec) -> tuple[str, Question]:
    return str(row["imageId"]), _question(str(row["id"]), row, spec, f"question {row['id']}")


GQA = Format(
    name="gqa",
    metric="exact match",
    instruction=SHORT_ANSWER,
    read=read,
    score=each(lambda question, text: gqa_match(text, question.answers[0])),
    figures=figures,
    hub=HubSource("testdev", _from_row, "{split}_balanced_instructions", "{split}_balanced_images"),
)
