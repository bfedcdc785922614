"""Points of a sweep against each other: paired by question, clustered by image; and which of them are on the front."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infoprune_export.measure.statistics import clustered_mean
from infoprune_export.validate.study_results import Interaction, Mean

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Scores of a run's questions, as its validation wrote them down (`verdict.question_scores`)."""

    questions: str
    """sha256 of what was asked."""
    clusters: NDArray[np.int64]
    """Number of questions of each image, [images]."""
    scores: Floats
    """0..1, [questions]."""


def scored(written: Mapping[str, Any], step: str = "engine") -> Scored:
    """The scores behind one step."""
    return Scored(
        written["questions_sha256"],
        np.array(written["clusters"], np.int64),
        np.array(written["scores"][step], np.float64),
    )


def mean_of(values: Floats, clusters: NDArray[np.int64]) -> Mean:
    """`measure.statistics.clustered_mean` in the form of a sweep's results."""
    percent, error = clustered_mean(values, clusters)
    return {"percent": percent, "standard_error": error, "questions": len(values)}


# ── Interaction ──────────────────────────────────────────────────────────────


def interactions(grid: Mapping[str, Sequence[Any]], points: Mapping[tuple[int, ...], Scored]) -> list[Interaction]:
    """The interaction of every two keys, from their first values to every other, at every value of the other keys.

    `points` is by places in the grid's lists, in the order of its keys; all are there, and were asked the same.
    """
    keys = list(grid)
    found: list[Interaction] = []
    for a, b in itertools.combinations(range(len(keys)), 2):
        others = [range(len(grid[key])) if i not in (a, b) else (0,) for i, key in enumerate(keys)]
        for rest in itertools.product(*others):
            for end_a, end_b in itertools.product(range(1, len(grid[keys[a]])), range(1, len(grid[keys[b]]))):

                def at(place_a: int, place_b: int, rest: tuple[int, ...] = rest, a: int = a, b: int = b) -> Scored:
                    place = list(rest)
                    place[a], place[b] = place_a, place_b
                    return points[tuple(place)]

                start, first, second = at(0, 0), at(end_a, 0), at(0, end_b)
                both = at(end_a, end_b).scores - start.scores
                changes = first.scores - start.scores, second.scores - start.scores
                found.append(
                    {
                        "keys": [keys[a], keys[b]],
                        "start": [grid[keys[a]][0], grid[keys[b]][0]],
                        "end": [grid[keys[a]][end_a], grid[keys[b]][end_b]],
                        "at": {key: grid[key][rest[i]] for i, key in enumerate(keys) if i not in (a, b)},
                        "first": mean_of(changes[0], start.clusters),
                        "second": mean_of(changes[1], start.clusters),
                        "both": mean_of(both, start.clusters),
                        "interaction": mean_of(both - changes[0] - changes[1], start.clusters),
                    }
                )
    return found


# ── Front ────────────────────────────────────────────────────────────────────


def on_front(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Which points no other dominates: none costs as little and is worth as much, one of the two being better."""
    points = list(zip(costs, values, strict=True))
    return [not any(c <= cost and v >= value and (c < cost or v > value) for c, v in points) for cost, value in points]
