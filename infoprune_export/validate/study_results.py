"""Shapes of what a sweep is written down as, in JSON."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

from infoprune_export.measure.results import Machine, Percentiles, Ratio


class Mean(TypedDict):
    """A mean over questions and its standard error, questions of one image being one cluster."""

    percent: float
    standard_error: float
    questions: int


class PointLatency(TypedDict):
    """A point's exported graph on random images, timed in the same rounds as all others."""

    batch_size: int
    milliseconds: Percentiles
    speed_up: Ratio
    """The original's time over this one's."""


class StudyPoint(TypedDict):
    """One combination of the grid's values. After a refusal everything behind it is empty."""

    point: str
    settings: dict[str, Any]
    """Dotted keys and their values."""
    refused: str | None
    """Why it could not be made, in a line."""
    verdict: str | None
    """PASS or FAIL, of the engine against the point's own limits."""
    failed_checks: list[str]
    accuracy: Mean | None
    """Of the engine."""
    to_original: Mean | None
    """Engine minus original, paired by question."""
    size: dict[str, Any] | None
    """As in validation.json: FLOPs, parameters, visual tokens, shares of heads and FFN."""
    latency: list[PointLatency]
    on_front: bool
    """No other point, nor the original, is both as fast and as accurate at the first batch size."""


class Interaction(TypedDict):
    """What two keys lose together beyond what each loses alone, in points, paired by question.

    With score s(a, b): ``first`` = s(a1, b0) - s(a0, b0), ``second`` = s(a0, b1) - s(a0, b0), ``both`` = s(a1, b1) -
    s(a0, b0), ``interaction`` = both - first - second. Additive losses have interaction 0.
    """

    keys: list[str]
    start: list[Any]
    """a0 and b0: the values that come first in the grid."""
    end: list[Any]
    """a1 and b1."""
    at: dict[str, Any]
    """Values of the grid's other keys."""
    first: Mean
    second: Mean
    both: Mean
    interaction: Mean


class Original(TypedDict):
    """The unpruned model, as the first point that was made exports and asks it."""

    accuracy: Mean
    latency: dict[str, Percentiles]
    """By batch size."""


class Study(TypedDict):
    """A sweep over a recipe's grid."""

    name: str
    grid: dict[str, list[Any]]
    metric: str
    original: Original
    points: list[StudyPoint]
    interactions: list[Interaction]
    """Of every two keys, where all points were made and asked the same questions."""
    no_interactions: str | None
    """Why there are none."""
    threads: int
    rounds: dict[str, int]
    """Timed rounds by batch size."""
    machine: Machine
    libraries: dict[str, str]
