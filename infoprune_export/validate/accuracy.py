"""Task accuracy of any encoder in front of the same language model, with standard errors clustered by image.

Images are read and prepared by worker processes where the recipe asks for some, and batches are shared out between the
processes of a distributed run, if there is one. The batches are the same for any number of either, and so are the
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from infoprune_export.data.dataset import Split
from infoprune_export.data.formats import format_of
from infoprune_export.data.samples import Question, Sample, open_image
from infoprune_export.errors import InfopruneError
from infoprune_export.measure.statistics import clustered_mean
from infoprune_export.models.calibration import batches
from infoprune_export.models.vlm import VLM, Decoding, VisualTokens, answer, place, prepare

Encode = Callable[[dict[str, torch.Tensor]], VisualTokens]
"""Tower inputs to what the language model sees."""
Answers = Sequence[Sequence[str]]
"""Texts per sample and question."""


@dataclass(frozen=True)
class Estimate:
    """A mean of per-question values in percent, with its standard error; questions of one image are one cluster."""

    percent: float
    standard_error: float
    questions: int

    def to_dict(self) -> dict[str, Any]:
        return {"percent": self.percent, "standard_error": self.standard_error, "questions": self.questions}


# ── Asking ───────────────────────────────────────────────────────────────────


def split_answers(
    vlm: VLM,
    split: Split,
    encode: Encode,
    *,
    on_batch: Callable[[int], None] = lambda images: None,
    decoder: Decoding | None = None,
) -> list[list[str]]:
    """`collect_answers` to what validates in `split`, asked as its recipe says."""
    return collect_answers(
        vlm,
        split.validation,
        encode,
        on_batch=on_batch,
        decoder=decoder,
        max_new_tokens=split.max_new_tokens,
        workers=split.workers,
    )


def collect_answers(
    vlm: VLM,
    samples: Sequence[Sample],
    encode: Encode,
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda images: None,
    decoder: Decoding | None = None,
    max_new_tokens: int = 8,
    workers: int = 0,
) -> list[list[str]]:
    """Greedy answers, per sample and question. Every image is encoded once for all its questions.

    The language model runs within `decoder`, one block per batch. In a distributed run every process must call this
    with the same samples; each answers every so many-th batch, and all get all answers.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    mine = list(batches(samples, batch_size))[rank::processes]
    answered: list[list[list[str]]] = []
    for batch, inputs in zip(mine, _prepared(vlm, mine, workers), strict=True):
        with torch.inference_mode():
            visual = encode(place(vlm, inputs))
        rows = [row for row, sample in enumerate(batch) for _ in sample.questions]
        questions = [question.text for sample in batch for question in sample.questions]
        texts = answer(vlm, visual.rows(rows), questions, max_new_tokens, decoder=decoder) if questions else []
        answered.append([])
        for sample in batch:
            answered[-1].append(texts[: len(sample.questions)])
            texts = texts[len(sample.questions) :]
        on_batch(len(batch))
    if processes > 1:
        answered = _gathered(answered, processes)
    return [texts for batch_texts in answered for texts in batch_texts]


def _gathered(answered: list[list[list[str]]], processes: int) -> list[list[list[str]]]:
    """All processes' batches, in the order in which they were dealt out."""
    from accelerate.utils import gather_object

    # A list of one entry per process, which gather_object puts one behind the other.
    dealt: list[list[list[list[str]]]] = gather_object([answered])
    rounds = max(map(len, dealt))
    return [dealt[rank][turn] for turn in range(rounds) for rank in range(processes) if turn < len(dealt[rank])]


class _Prepared(Dataset[dict[str, torch.Tensor] | str]):
    """Batches of samples as tower inputs on the CPU, or the error of one as text: a worker's traceback is nobody's."""

    def __init__(self, vlm: VLM, wanted: Sequence[Sequence[Sample]]) -> None:
        self._processor = vlm.processor.image_processor
        self._wanted = wanted

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor] | str:
        try:
            return prepare(self._processor, [open_image(sample.image) for sample in self._wanted[number]])
        except InfopruneError as error:
            return str(error)


def _prepared(vlm: VLM, wanted: Sequence[Sequence[Sample]], workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """Tower inputs of every batch in order, a few of them ahead where there are workers."""
    loader = DataLoader(_Prepared(vlm, wanted), batch_size=None, num_workers=min(workers, len(wanted)))
    for inputs in loader:
        if isinstance(inputs, str):
            raise InfopruneError(inputs)
        yield inputs


# ── Scores ───────────────────────────────────────────────────────────────────


def split_scores(split: Split, answers: Answers, baseline: Answers) -> NDArray[np.float64]:
    """Score of every question, in sample order, 0..1: the benchmark's, or agreement with `baseline` without labels."""
    return (
        task_scores(split.validation, answers, split.format) if split.labelled else agreement_scores(answers, baseline)
    )


def task_scores(samples: Sequence[Sample], answers: Answers, name: str = "vqav2") -> NDArray[np.float64]:
    """Score of every question by the metric of a benchmark, in sample order, 0..1."""
    return format_of(name).score(*_flat(samples, answers))


def official_figures(split: Split, answers: Answers) -> dict[str, float]:
    """The benchmark's own figures for these answers, see `data.formats`; none without labels."""
    if not split.labelled:
        return {}
    questions, texts = _flat(split.validation, answers)
    known = format_of(split.format)
    return known.figures(questions, texts, known.score(questions, texts))


def _flat(samples: Sequence[Sample], answers: Answers) -> tuple[list[Question], list[str]]:
    pairs = [
        (question, text)
        for sample, given in zip(samples, answers, strict=True)
        for question, text in zip(sample.questions, given, strict=True)
    ]
    return [question for question, _ in pairs], [text for _, text in pairs]


def agreement_scores(answers: Sequence[Sequence[str]], reference: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """1 where both answers are the same text, in sample order."""
    return np.array(
        [
            float(a == b)
            for given, known in zip(answers, reference, strict=True)
            for a, b in zip(given, known, strict=True)
        ]
    )


def estimate(samples: Sequence[Sample], scores: NDArray[np.float64]) -> Estimate:
    """Mean and cluster-robust standard error of per-question scores (or paired differences of them)."""
    percent, error = clustered_mean(scores, [len(sample.questions) for sample in samples])
    return Estimate(percent, error, len(scores))


def by_kind(samples: Sequence[Sample], scores: NDArray[np.float64]) -> Mapping[str, float]:
    """Mean score in percent for every question kind there is."""
    kinds = np.array([question.kind for sample in samples for question in sample.questions])
    return {str(kind): 100 * float(scores[kinds == kind].mean()) for kind in sorted(set(kinds.tolist())) if kind}
