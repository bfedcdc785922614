"""ScienceQA: ``problems.json``, ``pid_splits.json`` and ``images/<split>/<pid>/image.png``; problems with an image.

``{pid: {question, choices: [texts], answer: index, hint, image: "image.png" or null, subject, topic, grade}}`` and
``{split: [pids]}``. This is the subset IMG of papers; problems without an image have nothing to say about an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infoprune_export.data.formats.base import (
    LETTER,
    OPTIONS,
    Format,
    HubSource,
    Scores,
    asked,
    by_name,
    each,
    field,
    grouped,
    image_at,
    options,
    percent,
    read_json,
    unique,
)
from infoprune_export.data.metrics.choices import scienceqa_letter
from infoprune_export.data.samples import Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

_MOST_CHOICES = 5


def read(spec: DataSpec) -> list[Sample]:
    """Read the problems of a split that have an image."""
    images, problems, splits = Path(spec.images or ""), Path(spec.questions or ""), Path(spec.annotations or "")
    tree, parts = read_json(problems, "problems.json"), read_json(splits, "pid_splits.json")
    split = spec.split or "test"
    if not isinstance(tree, dict) or not tree:
        raise InfopruneError(f"{problems}: holds no problems by their ids; name problems.json")
    if not isinstance(parts, dict) or not isinstance(parts.get(split), list):
        known = ", ".join(map(str, parts)) if isinstance(parts, dict) else "no splits"
        raise InfopruneError(f"{splits}: no split {split!r}, there is {known[:80]}; name pid_splits.json")
    pairs = []
    for pid in map(str, parts[split]):
        where = f"{problems}: problem {pid}"
        if pid not in tree:
            raise InfopruneError(f"{where} is missing, which {splits.name} puts into {split}")
        question = _question(pid, tree[pid], spec, where)
        if name := tree[pid].get("image"):
            pairs.append((image_at(images, f"{split}/{pid}/{name}", where), question))
    if not pairs:
        raise InfopruneError(f"{problems}: no problem of split {split!r} has an image")
    unique((question.id for _, question in pairs), splits)
    return grouped(pairs)


def _question(pid: str, entry: Any, spec: DataSpec, where: str) -> Question:
    choices = tuple(map(str, field(entry, "choices", list, where)))
    answer = field(entry, "answer", int, where)
    if not 0 <= answer < len(choices) <= _MOST_CHOICES:
        raise InfopruneError(f"{where}: answer {answer} of {len(choices)} choices; there are 1 to {_MOST_CHOICES}")
    hint = str(entry.get("hint") or "")
    context = f"Context: {hint}\n" if hint else ""
    text = f"{context}{field(entry, 'question', str, where)}\n{options(choices)}"
    return Question(asked(text, spec, LETTER), (OPTIONS[answer],), str(entry.get("subject") or ""), pid, choices)


def figures(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """Accuracy, also by subject."""
    return {"accuracy": percent(scores), **by_name([question.kind for question in questions], scores)}


def _from_row(row: Mapping[str, Any], spec: DataSpec) -> tuple[str, Question]:
    number = row.get("id", "")
    return "", _question(str(number), row, spec, f"problem {number or str(row['question'])[:40]!r}")


SCIENCEQA = Format(
    name="scienceqa",
    metric="accuracy",
    instruction=LETTER,
    read=read,
    score=each(lambda question, text: float(scienceqa_letter(text, len(question.choices)) == question.answers[0])),
    figures=figures,
    hub=HubSource("test", _from_row, "ScienceQA-IMG"),
)
