"""POPE: ``coco_pope_random.json``, ``_popular`` and ``_adversarial``, and COCO's val2014 images.

JSON lines ``{question_id, image, text, label}``, label yes or no. LLaVA's ``llava_pope_test.jsonl`` holds the same
questions with the instruction behind them, so that these files and the official instruction make the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infoprune_export.data.formats.base import (
    SHORT_ANSWER,
    Format,
    HubSource,
    Scores,
    asked,
    each,
    field,
    grouped,
    image_at,
    json_lines,
    unique,
)
from infoprune_export.data.metrics.yes_no import pope_answer, pope_figures
from infoprune_export.data.samples import ImageSource, Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

_WHAT = "the folder with coco_pope_*.json, or one of them"


def read(spec: DataSpec) -> list[Sample]:
    """Read one category, or all of a folder in the order of their names."""
    images, path = Path(spec.images or ""), Path(spec.questions or "")
    files = sorted(path.glob("coco_pope_*.json")) if path.is_dir() else [path]
    if not files:
        raise InfopruneError(f"{path}: no coco_pope_*.json in this folder; name {_WHAT}")
    pairs: list[tuple[ImageSource, Question]] = []
    for file in files:
        match = re.fullmatch(r".*_pope_(\w+)", file.stem)
        category = match.group(1) if match else file.stem
        found = []
        for where, entry in json_lines(file, _WHAT):
            number = field(entry, "question_id", (int, str), where)
            label = _label(field(entry, "label", str, where), where)
            text = asked(field(entry, "text", str, where), spec, SHORT_ANSWER)
            image = image_at(images, field(entry, "image", str, where), where)
            found.append((image, Question(text, (label,), category, f"{category}/{number}")))
        if not found:
            raise InfopruneError(f"{file}: empty; name {_WHAT}")
        unique((question.id for _, question in found), file)
        pairs += found
    return grouped(pairs)


def _label(text: str, where: str) -> str:
    if text not in ("yes", "no"):
        raise InfopruneError(f"{where}: label is {text!r:.40}, neither yes nor no")
    return text


def figures(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """See `pope_figures`."""
    predicted = [pope_answer(text) for text in answers]
    return pope_figures(predicted, [q.answers[0] for q in questions], [q.kind for q in questions])


def _from_row(row: Mapping[str, Any], spec: DataSpec) -> tuple[str, Question]:
    where = f"question {row['id']}"
    label, category = _label(row["answer"], where), str(row["category"])
    number = f"{category}/{row['question_id']}"
    return str(row["image_source"]), Question(asked(row["question"], spec, SHORT_ANSWER), (label,), category, number)


POPE = Format(
    name="pope",
    metric="accuracy",
    instruction=SHORT_ANSWER,
    read=read,
    score=each(lambda question, text: float(pope_answer(text) == question.answers[0])),
    figures=figures,
    hub=HubSource("test", _from_row),
)
