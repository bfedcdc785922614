"""Task accuracy of any encoder in front of the same language model, with standard errors clustered by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infoprune_export.data.vqa import Sample, vqa_accuracy
from infoprune_export.models.calibration import batches, inputs_of
from infoprune_export.models.vlm import VLM, Decoding, VisualTokens, answer

Encode = Callable[[dict[str, torch.Tensor]], VisualTokens]
"""Tower inputs to what the language model sees."""


@dataclass(frozen=True)
class Estimate:
    """A mean of per-question values in percent, with its standard error; questions of one image are one cluster."""

    percent: float
    standard_error: float
    questions: int

    def to_dict(self) -> dict[str, Any]:
        return {"percent": self.percent, "standard_error": self.standard_error, "questions": self.questions}


def collect_answers(
    vlm: VLM,
    samples: Sequence[Sample],
    encode: Encode,
    *,
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda images: None,
    decoder: Decoding | None = None,
) -> list[list[str]]:
    """Greedy answers, per sample and question. Every image is encoded once for all its questions.

    The language model runs within `decoder`, one block per batch.
    """
    answers: list[list[str]] = []
    for batch in batches(samples, batch_size):
        with torch.inference_mode():
            visual = encode(inputs_of(vlm, batch))
        rows = [row for row, sample in enumerate(batch) for _ in sample.questions]
        questions = [question.text for sample in batch for question in sample.questions]
        texts = answer(vlm, visual.rows(rows), questions, decoder=decoder)
        for sample in batch:
            answers.append(texts[: len(sample.questions)])
            texts = texts[len(sample.questions) :]
        on_batch(len(batch))
    return answers


def vqa_scores(samples: Sequence[Sample], answers: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """VQA accuracy of every question, in sample order, 0..1."""
    return np.array(
        [
            vqa_accuracy(text, question.answers)
            for sample, given in zip(samples, answers, strict=True)
            for question, text in zip(sample.questions, given, strict=True)
        ]
    )


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
    clusters = np.repeat(np.arange(len(samples)), [len(sample.questions) for sample in samples])
    sums = np.bincount(clusters, weights=scores - scores.mean(), minlength=len(samples))
    return Estimate(100 * float(scores.mean()), 100 * math.sqrt(float((sums**2).sum())) / len(scores), len(scores))


def by_kind(samples: Sequence[Sample], scores: NDArray[np.float64]) -> Mapping[str, float]:
    """Mean score in percent for every question kind there is."""
    kinds = np.array([question.kind for sample in samples for question in sample.questions])
    return {str(kind): 100 * float(scores[kinds == kind].mean()) for kind in sorted(set(kinds.tolist())) if kind}
