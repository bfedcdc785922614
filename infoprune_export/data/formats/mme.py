"""MME: the folder ``MME_Benchmark_release``, one folder per subtask in either of its two layouts.

Beside each image ``0001.png`` a ``0001.txt``, or images in ``images/`` and texts in ``questions_answers_YN/``. A text
has a line per question: the question, a tab, Yes or No. Every question ends in "Please answer yes or no.", in whose
place LLaVA's script puts its own instruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infoprune_export.data.formats.base import SHORT_ANSWER, Format, HubSource, Scores, asked, each, only_image
from infoprune_export.data.metrics.yes_no import COGNITION, PERCEPTION, mme_answer, mme_figures
from infoprune_export.data.samples import IMAGE_SUFFIXES, Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

_SUBTASKS = (*PERCEPTION, *COGNITION)
_TEXTS = "questions_answers_YN"
_ASKS_YES_OR_NO = "Please answer yes or no."


def read(spec: DataSpec) -> list[Sample]:
    """Read every subtask there is, in the benchmark's order."""
    root = Path(spec.images or "")
    samples = [sample for name in _SUBTASKS if (root / name).is_dir() for sample in _subtask(root / name, spec)]
    if not samples:
        raise InfopruneError(f"{root}: no folder of an MME subtask such as existence; name MME_Benchmark_release")
    return samples


def _subtask(folder: Path, spec: DataSpec) -> list[Sample]:
    texts = folder / _TEXTS if (folder / _TEXTS).is_dir() else folder
    images = folder / "images" if (folder / "images").is_dir() else folder
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(images.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            by_stem.setdefault(path.stem, []).append(path)
    samples = []
    for path in sorted(texts.glob("*.txt")):
        image = only_image(by_stem.get(path.stem, ()), images, path.stem, str(path))
        samples.append(Sample(image, tuple(_questions(path, folder.name, image.name, spec))))
    if not samples:
        raise InfopruneError(f"{texts}: no question (*.txt) in it; copy the folder again")
    return samples


def _questions(path: Path, subtask: str, image: str, spec: DataSpec) -> list[Question]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InfopruneError(f"{path}: cannot be read ({error}); copy the folder again") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, tab, answer = line.rpartition("\t")
        if not tab:
            raise InfopruneError(f"{path}: line {number} has no tab between question and answer; copy the file again")
        where = f"{path}: line {number}"
        questions.append(_question(text, answer.strip(), subtask, f"{subtask}/{image}", number, spec, where))
    if not questions:
        raise InfopruneError(f"{path}: empty; copy the folder again")
    return questions


def _question(text: str, answer: str, subtask: str, group: str, number: int, spec: DataSpec, where: str) -> Question:
    if answer.lower() not in ("yes", "no"):
        raise InfopruneError(f"{where}: the answer is {answer!r:.40}, neither Yes nor No")
    text = text.strip()
    if spec.instruction is None:
        text = text.removesuffix(_ASKS_YES_OR_NO).strip()
    return Question(asked(text, spec, SHORT_ANSWER), (answer.capitalize(),), subtask, f"{group}/{number}", (), group)


def figures(questions: Sequence[Question], answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """See `mme_figures`; points, not percent."""
    return mme_figures(scores, [question.kind for question in questions], [question.group for question in questions])


def _from_row(row: Mapping[str, Any], spec: DataSpec) -> tuple[str, Question]:
    subtask, name = str(row["category"]), str(row["question_id"])
    group = name if name.startswith(f"{subtask}/") else f"{subtask}/{name}"
    # Rows of an image have no number of their own.
    number = 1 if str(row["answer"]).lower() == "yes" else 2
    return group, _question(str(row["question"]), str(row["answer"]), subtask, group, number, spec, f"question {name}")


MME = Format(
    name="mme",
    metric="accuracy",
    instruction=SHORT_ANSWER,
    read=read,
    score=each(lambda question, text: float(mme_answer(text) == question.answers[0].lower())),
    figures=figures,
    hub=HubSource("test", _from_row),
    texts="*.txt",
)
