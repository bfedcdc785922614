"""Yes and no: POPE's and MME's reading of an answer, and their figures.

POPE as in LLaVA's ``eval_pope.py``: up to the first period, without commas, split at spaces; "No", "no" or "not" among
the words is a no, everything else a yes, "NO" and an empty answer included. Figures are per category, and papers print
the means of the three.

MME as in the benchmark's ``eval_tool``: lower case; the answer, or else its first four characters, must hold "yes" or
"no", in this order. Per subtask, accuracy is over questions and accuracy+ over images, whose questions must all be
right; a subtask's score is their sum in percent, 200 at most, and perception (2000) and cognition (800) are sums of
scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_answer(text: str) -> str:
    """``yes`` or ``no``."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_answer(text: str) -> str:
    """``yes``, ``no``, or ``other``, which is never right."""
    lower = text.lower()
    start = lower if lower in ("yes", "no") else lower[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def confusion_figures(predicted: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of yes, and the share of yes among predictions, in percent.

    A ratio whose denominator is 0 is 0; the official script stops there.
    """
    said, meant = np.array(predicted) == "yes", np.array(labels) == "yes"
    hits = int((said & meant).sum())
    precision, recall = _ratio(hits, int(said.sum())), _ratio(hits, int(meant.sum()))
    return {
        "accuracy": 100 * float((said == meant).mean()),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": 100 * float(said.mean()),
    }


def pope_figures(predicted: Sequence[str], labels: Sequence[str], categories: Sequence[str]) -> dict[str, float]:
    """`confusion_figures` by category as ``category/figure``, and their means over categories as ``mean/figure``."""
    names = np.array(categories)
    by_category = {
        name: confusion_figures(np.array(predicted)[names == name].tolist(), np.array(labels)[names == name].tolist())
        for name in sorted(set(categories))
    }
    figures = {f"{name}/{key}": value for name, found in by_category.items() for key, value in found.items()}
    keys = next(iter(by_category.values()), {})
    means = {f"mean/{key}": float(np.mean([found[key] for found in by_category.values()])) for key in keys}
    return means | figures


def mme_figures(right: NDArray[np.float64], subtasks: Sequence[str], images: Sequence[str]) -> dict[str, float]:
    """MME's totals and scores by subtask; points, not percent.

    Args:
        right: 1 or 0 per question, [N].
        subtasks: of every question.
        images: name of every question's image.
    """
    names, pictures = np.array(subtasks), np.array(images)
    scores = {}
    for name in dict.fromkeys(subtasks):
        mine, where = right[names == name], pictures[names == name]
        plus = [float(mine[where == picture].min()) for picture in dict.fromkeys(where.tolist())]
        scores[name] = 100 * (float(mine.mean()) + float(np.mean(plus)))
    totals = {
        title: sum(scores[name] for name in part if name in scores)
        for title, part in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {"total": sum(totals.values()), **totals, **scores}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
