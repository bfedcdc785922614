"""MMBench in English and Chinese: the released TSV with its images as base64.

Columns index, question, hint, A to D (some empty), answer, category, l2-category and image. Rows whose index is equal
modulo 1,000,000 are one item, asked with its options rotated; an item counts only if all its rows are right (circular
evaluation). The image column holds base64, or the index of the row that has the image.

The score of a question is that of its item, so the mean weighs an item by the number of its options, while the official
accuracy counts every item once. The legacy release (without rotated rows) gives vanilla accuracy by the same rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from infoprune_export.data.formats.base import LETTER, OPTIONS, Format, HubSource, Scores, asked, by_name, options
from infoprune_export.data.formats.base import grouped as by_image
from infoprune_export.data.formats.tsv import Cell, read_tsv
from infoprune_export.data.metrics.choices import mmbench_letter
from infoprune_export.data.samples import EmbeddedImage, Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

LETTER_CN = "请直接回答选项字母。"
_ITEM = 1_000_000
_NEEDED = ("index", "question", "A", "B", "answer", "category", "image")
_LONGEST_REFERENCE = 16
"""Characters of an image column that refers to another row."""


def read(spec: DataSpec, official: str) -> list[Sample]:
    """Read a split; images stay in the file."""
    path = Path(spec.questions or "")
    rows, images, references = [], {}, {}
    for number, row in _rows(path):
        where = f"{path}: row {number}"
        index = _index(row["index"].text, where)
        if index in images or index in references:
            raise InfopruneError(f"{where}: index {index} is there twice; keep one of the two")
        image = row["image"]
        if image.length <= _LONGEST_REFERENCE:
            references[index] = (_index(image.text, f"{where}: image"), where)
        else:
            images[index] = EmbeddedImage(path, image.offset, image.length, f"index-{index}")
        rows.append((index, _question(index, {k: c.text for k, c in row.items()}, spec, official, where)))
    if not rows:
        raise InfopruneError(f"{path}: no row in it; name an MMBench TSV")
    for index, (other, where) in references.items():
        if other not in images:
            raise InfopruneError(f"{where}: its image is that of index {other}, which has none; name the whole TSV")
        images[index] = images[other]
    return by_image((images[_first_of(index, images)], question) for index, question in rows)


def _first_of(index: int, images: Mapping[int, EmbeddedImage]) -> int:
    """The item's own row: rotated rows may repeat its image, byte for byte."""
    return index % _ITEM if index % _ITEM in images else index


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Cell]]]:
    for number, row in read_tsv(path, "an MMBench TSV", large="image"):
        if missing := [name for name in _NEEDED if name not in row]:
            raise InfopruneError(f"{path}: no column {missing[0]!r}; there are {', '.join(row)[:120]}")
        yield number, row


def _index(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InfopruneError(f"{where}: index is {text!r:.40}, not a whole number") from None


def _question(index: int, row: Mapping[str, Any], spec: DataSpec, official: str, where: str) -> Question:
    choices = []
    for letter in OPTIONS[:4]:
        if _none(row.get(letter)):
            break
        choices.append(str(row[letter]))
    answer = str(row["answer"])
    if answer not in tuple(OPTIONS[: len(choices)]):
        raise InfopruneError(f"{where}: answer is {answer!r:.40}, not one of {OPTIONS[: len(choices)]!r}")
    hint = "" if _none(row.get("hint")) else f"{row['hint']}\n"
    text = f"{hint}{row['question']}\n{options(choices)}"
    item = str(index % _ITEM)
    return Question(asked(text, spec, official), (answer,), str(row["category"]), str(index), tuple(choices), item)


def _none(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "nan", "none")


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """1 for every question of an item whose questions are all right, else 0."""
    right = np.array(
        [float(mmbench_letter(text, q.choices) == q.answers[0]) for q, text in zip(questions, answers, strict=True)]
    )
    items = np.array([question.group for question in questions])
    whole = {item: float(right[items == item].min()) for item in dict.fromkeys(items.tolist())}
    return np.array([whole[item] for item in items.tolist()], np.float64)


def figures(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """Accuracy over items, also by category; and of rows by themselves, as if nothing was rotated."""
    first: dict[str, int] = {}
    for number, question in enumerate(questions):
        first.setdefault(question.group, number)
    places = list(first.values())
    rows = [mmbench_letter(text, q.choices) == q.answers[0] for q, text in zip(questions, answers, strict=True)]
    categories = by_name([questions[place].kind for place in places], scores[places])
    return {
        "accuracy": 100 * float(scores[places].mean()),
        "accuracy_of_rows": 100 * float(np.mean(rows)),
        **{f"category/{name}": value for name, value in categories.items()},
    }


def _from_row(row: Mapping[str, Any], spec: DataSpec, official: str) -> tuple[str, Question]:
    index = int(row["index"])
    return f"{index % _ITEM}", _question(index, row, spec, official, f"index {index}")


def _format(name: str, official: str, config: str) -> Format:
    return Format(
        name=name,
        metric="circular accuracy",
        instruction=official,
        read=partial(read, official=official),
        score=score,
        figures=figures,
        hub=HubSource("dev", partial(_from_row, official=official), config, scattered=True),
    )


MMBENCH = _format("mmbench", LETTER, "en")
MMBENCH_CN = _format("mmbench_cn", LETTER_CN, "cn")
