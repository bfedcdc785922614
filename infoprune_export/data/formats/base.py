"""What a benchmark's module gives, and how its files are read: every fault is one line that names file and entry."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infoprune_export.data.samples import ImageSource, Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
OPTIONS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Scores = NDArray[np.float64]
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class HubSource:
    """Where a benchmark's rows are among the releases of ``lmms-lab``."""

    split: str
    """Used without ``data.split``."""
    convert: Callable[[Mapping[str, Any], DataSpec], tuple[str, Question]]
    """A row to its image's key and its question; raises KeyError, TypeError or ValueError where it is malformed. Rows
    of one key are about one image; an empty key stands for an image of the row's own."""
    config: str | None = None
    images: str | None = None
    """A second configuration that has the images, by ``id``; without it every row has its own."""
    scattered: bool = False
    """Rows of one group may be anywhere in the split, which is then read to its end; else they are neighbours."""


@dataclass(frozen=True)
class Format:
    """One benchmark. Scores are per question and 0..1, so that two models can be compared in pairs."""

    name: str
    metric: str
    """What the mean of the scores is called."""
    instruction: str
    """What the official scripts of LLaVA put behind every question."""
    read: Callable[[DataSpec], list[Sample]]
    """Samples of local files; raises `InfopruneError` for the first fault in them."""
    score: Callable[[Sequence[Question], Sequence[str]], Scores]
    """Score of every answer. May depend on the other answers, of the same group."""
    figures: Callable[[Sequence[Question], Sequence[str], Scores], dict[str, float]]
    """The benchmark's own figures in percent, unless the name says otherwise, for these questions."""
    hub: HubSource
    max_new_tokens: int = 16
    texts: str | None = None
    """Pattern of further files below ``data.images`` that questions are read from."""


def asked(text: str, spec: DataSpec, official: str) -> str:
    """A question with the instruction behind it: the recipe's, or the official one where a format is named."""
    suffix = spec.instruction
    if suffix is None:
        suffix = official if spec.format is not None else ""
    return f"{text}\n{suffix}" if suffix else text


def each(score: Callable[[Question, str], float]) -> Callable[[Sequence[Question], Sequence[str]], Scores]:
    """A format's `score`, where no answer depends on another."""

    def scores(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        return np.array([score(question, text) for question, text in zip(questions, answers, strict=True)], np.float64)

    return scores


def overall(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """`figures` of a benchmark whose one figure is the mean."""
    return {"accuracy": percent(scores)}


def percent(scores: Scores) -> float:
    """Mean of 0..1 in percent."""
    return 100 * float(scores.mean())


def by_name(names: Sequence[str], scores: Scores) -> dict[str, float]:
    """Mean in percent for every name there is; questions without one are left out."""
    known = np.array(names)
    return {name: percent(scores[known == name]) for name in sorted(set(names)) if name}


# ── Files ────────────────────────────────────────────────────────────────────


def read_json(path: Path, what: str) -> Any:
    """A JSON file; `what` says what it should be.

    Raises:
        InfopruneError: missing, or no JSON.
    """
    try:
        return _loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InfopruneError(f"{path}: cannot be read ({error.strerror}); name {what}") from None
    except (ValueError, RecursionError):
        raise InfopruneError(f"{path}: not valid JSON; name {what}") from None


def entries_of(tree: Any, path: Path, key: str, what: str) -> list[Any]:
    """The list under `key` of a JSON object, or the whole tree for an empty key."""
    entries = tree.get(key) if key and isinstance(tree, dict) else tree if not key else None
    if not isinstance(entries, list):
        named = f"no list {key!r} in it" if key else "it holds no list"
        raise InfopruneError(f"{path}: {named}; this is not {what}")
    if not entries:
        raise InfopruneError(f"{path}: the list{f' {key!r}' if key else ''} is empty; this is not {what}")
    return entries


def field(entry: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of an entry; `where` names file and entry.

    Raises:
        InfopruneError: no such value, or of another type.
    """
    if not isinstance(entry, Mapping) or name not in entry:
        raise InfopruneError(f"{where} has no {name!r}")
    value = entry[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_KINDS[k] for k in kinds)
        raise InfopruneError(f"{where}: {name} is {value!r:.40}, not {wanted}")
    return value


_KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def annotators(values: Any, where: str, key: str | None = None) -> tuple[str, ...]:
    """Annotators' answers, a list of texts, or of objects with the text under `key`."""
    if not isinstance(values, (list, tuple)):
        raise InfopruneError(f"{where}: answers are no list")
    if not values:
        raise InfopruneError(f"{where} has no answers")
    texts = values if key is None else [v.get(key) if isinstance(v, Mapping) else None for v in values]
    if not all(isinstance(text, str) for text in texts):
        raise InfopruneError(f"{where}: answers are not {f'objects with {key!r}' if key else 'texts'}")
    return tuple(map(str, texts))


def unique(ids: Iterable[str], path: Path) -> None:
    """Refuse an id that is there twice."""
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise InfopruneError(f"{path}: id {name} is there twice; keep one of the two")
        seen.add(name)


def image_at(folder: Path, name: str, where: str) -> Path:
    """The image file of this name in `folder`, for the entry that asks about it.

    Raises:
        InfopruneError: there is none, or the name leaves the folder.
    """
    path = folder / name
    try:
        inside, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a character no name has, links that go round
        raise InfopruneError(f"{where}: image {name!r:.60} cannot be a file's name; correct it") from None
    if not inside:
        raise InfopruneError(f"{where}: image {name!r:.60} is outside of {folder}; name files inside of it")
    if not there:
        raise InfopruneError(f"{path}: no such image, which {where} asks about; set data.images to where it is")
    return path


def only_image(found: Sequence[Path], folder: Path, name: str, where: str) -> Path:
    """The one file that may be meant by a name without its ending.

    Raises:
        InfopruneError: there is none, or more than one.
    """
    if not found:
        raise InfopruneError(f"{folder}: no image {name}, which {where} asks about; copy the folder again")
    if len(found) > 1:
        raise InfopruneError(
            f"{folder}: {found[0].relative_to(folder)} and {found[1].relative_to(folder)} are both image {name}, which "
            f"{where} asks about; keep one of the two"
        )
    return found[0]


def grouped(pairs: Iterable[tuple[ImageSource, Question]]) -> list[Sample]:
    """One sample per image, in the order in which images first come, questions in theirs."""
    by_image: dict[ImageSource, list[Question]] = {}
    for image, question in pairs:
        by_image.setdefault(image, []).append(question)
    return [Sample(image, tuple(questions)) for image, questions in by_image.items()]


def options(choices: Sequence[str]) -> str:
    """Choices as lines ``A. text``."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(OPTIONS, choices, strict=False))


def json_lines(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """Where each line is, and the object it holds.

    Raises:
        InfopruneError: missing, or a line is no JSON.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}: line {number}", _parsed(line, f"{path}: line {number}", what)
    except OSError as error:
        raise InfopruneError(f"{path}: cannot be read ({error.strerror}); name {what}") from None
    except UnicodeDecodeError:
        raise InfopruneError(f"{path}: not UTF-8; name {what}") from None


def _parsed(line: str, where: str, what: str) -> Any:
    try:
        return _loads(line)
    except (ValueError, RecursionError):
        raise InfopruneError(f"{where} is not valid JSON; name {what}") from None


def _loads(text: str) -> Any:
    """JSON whose texts can be written and hashed: an escaped half of a character is a ValueError, as UTF-8 has none."""
    tree = json.loads(text)
    if _ESCAPED_HALF.search(text):
        json.dumps(tree, ensure_ascii=False).encode("utf-8")
    return tree
