"""Means, interactions and fronts of a sweep against what they are by definition."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infoprune_export.data.samples import Question, Sample
from infoprune_export.validate.accuracy import estimate
from infoprune_export.validate.study_statistics import Scored, interactions, mean_of, on_front, scored


def random_scores(seed: int, images: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    clusters = rng.integers(1, 8, images)
    return clusters, rng.random(int(clusters.sum()))


def test_the_mean_is_the_one_that_validation_gives():
    clusters, values = random_scores(0)
    question = Question("?", ("a",), "k")
    samples = [Sample(Path(f"{i}.png"), (question,) * int(n)) for i, n in enumerate(clusters)]
    assert mean_of(values, clusters) == estimate(samples, values).to_dict()


def test_scores_are_read_as_validation_writes_them():
    written = {"questions_sha256": "x", "clusters": [1, 2], "scores": {"original": [0, 0, 0], "engine": [1, 0.3, 0]}}
    assert scored(written).scores.tolist() == [1, 0.3, 0]
    assert scored(written, "original").scores.tolist() == [0, 0, 0]
    assert scored(written).clusters.tolist() == [1, 2]


# ── Interaction ──────────────────────────────────────────────────────────────

GRID = {"export.quantization": ("none", "int8"), "heads.remove": (0.0, 0.25, 0.5)}


def points_with(grid, loss) -> dict[tuple[int, ...], Scored]:
    """Scores of 300 questions, made by a function of the place and the questions' own noise."""
    clusters, base = np.full(60, 5), np.random.default_rng(0).random(300)
    places = itertools.product(*(range(len(values)) for values in grid.values()))
    return {place: Scored("same", clusters, base - loss(place, base)) for place in places}


def test_losses_that_add_up_have_no_interaction_at_all():
    found = interactions(GRID, points_with(GRID, lambda place, base: 0.1 * place[0] + 0.03 * place[1] * base))
    assert [(row["start"], row["end"]) for row in found] == [
        (["none", 0.0], ["int8", 0.25]),
        (["none", 0.0], ["int8", 0.5]),
    ]
    for row in found:
        assert row["interaction"]["percent"] == pytest.approx(0, abs=1e-12)
        assert row["interaction"]["standard_error"] == pytest.approx(0, abs=1e-12)
        assert row["first"]["percent"] == pytest.approx(-10)


def test_an_interaction_is_found_and_its_error_is_that_of_the_paired_difference():
    effect = np.random.default_rng(1).normal(0.04, 0.2, 300)

    def loss(place, base):
        return 0.1 * place[0] + 0.05 * place[1] + effect * (place == (1, 2))

    small, large = interactions(GRID, points_with(GRID, loss))
    assert small["interaction"]["percent"] == pytest.approx(0, abs=1e-12)
    expected = mean_of(-effect, np.full(60, 5))
    assert large["interaction"] == pytest.approx(expected)
    assert large["both"]["percent"] == pytest.approx(
        large["first"]["percent"] + large["second"]["percent"] + expected["percent"]
    )


def test_with_three_keys_every_pair_is_looked_at_wherever_the_third_is():
    grid = {"a": ("x", "y"), "b": (1, 2), "c": (0, 5)}
    found = interactions(grid, points_with(grid, lambda place, base: 0.2 * (place[0] * place[1] * place[2]) + 0 * base))
    assert [(row["keys"], row["at"]) for row in found] == [
        (["a", "b"], {"c": 0}),
        (["a", "b"], {"c": 5}),
        (["a", "c"], {"b": 1}),
        (["a", "c"], {"b": 2}),
        (["b", "c"], {"a": "x"}),
        (["b", "c"], {"a": "y"}),
    ]
    assert [round(row["interaction"]["percent"], 9) + 0 for row in found] == [0, -20, 0, -20, 0, -20]


# ── Front ────────────────────────────────────────────────────────────────────


def test_the_front_of_a_drawn_case():
    # The last costs as much as the second and is worth less; the third is dear and bad.
    assert on_front([1, 2, 3, 4, 2], [1, 5, 4, 9, 3]) == [True, True, False, True, False]
    assert on_front([1, 1], [2, 2]) == [True, True], "equal points do not push each other out"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_beats_in_one_and_equals_in_the_other(points):
    marked = on_front([c for c, _ in points], [v for _, v in points])
    assert any(marked)
    for (cost, value), mine in zip(points, marked, strict=True):
        beaten = any((c < cost and v >= value) or (c <= cost and v > value) for c, v in points)
        assert mine == (not beaten)
