"""Scores and standard errors on made-up answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from infoprune_export.data.samples import Question, Sample
from infoprune_export.validate.accuracy import agreement_scores, by_kind, estimate, task_scores


def samples_of(counts: list[int], kind: str = "") -> list[Sample]:
    return [
        Sample(Path(f"{i}.png"), tuple(Question(f"q{j}", ("yes",) * 10, kind) for j in range(n)))
        for i, n in enumerate(counts)
    ]


# ── Estimate ─────────────────────────────────────────────────────────────────


def test_estimate_equals_cluster_robust_formula():
    counts = [1, 3, 2, 4]
    scores = np.random.default_rng(0).uniform(size=10)
    total, start = 0.0, 0
    for count in counts:
        total += sum(scores[start + i] - scores.mean() for i in range(count)) ** 2
        start += count
    result = estimate(samples_of(counts), scores)
    assert result.percent == pytest.approx(100 * scores.mean())
    factor = len(counts) / (len(counts) - 1)
    assert result.standard_error == pytest.approx(100 * math.sqrt(factor * total) / 10)
    assert result.questions == 10


def test_estimate_of_singleton_clusters_equals_independent_standard_error():
    scores = np.random.default_rng(1).uniform(size=50)
    independent = 100 * scores.std(ddof=1) / math.sqrt(50)
    assert estimate(samples_of([1] * 50), scores).standard_error == pytest.approx(independent, rel=1e-12)


def test_estimate_of_copied_questions_is_as_uncertain_as_one_question_per_image():
    scores = np.random.default_rng(2).uniform(size=20)
    once = estimate(samples_of([1] * 20), scores)
    copied = estimate(samples_of([5] * 20), np.repeat(scores, 5))
    assert copied.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    assert copied.questions == 100


def test_estimate_of_differences_within_an_image_cancels():
    assert estimate(samples_of([2, 2, 2]), np.array([1.0, -1, 1, -1, -1, 1])).standard_error == pytest.approx(0)


def test_estimate_of_constant_scores_has_no_error():
    result = estimate(samples_of([2, 3]), np.ones(5))
    assert (result.percent, result.standard_error) == (100.0, 0.0)


def test_estimate_ignores_images_without_questions():
    scores = np.array([1.0, 0.0, 0.0])
    assert estimate(samples_of([2, 0, 1, 0]), scores) == estimate(samples_of([2, 1]), scores)


@pytest.mark.parametrize("count", [4, 6])
def test_estimate_with_wrong_number_of_scores_raises(count: int):
    with pytest.raises(ValueError):
        estimate(samples_of([2, 3]), np.ones(count))


def test_estimate_to_dict_is_json():
    tree = json.loads(json.dumps(estimate(samples_of([1, 1]), np.array([1.0, 0.0])).to_dict()))
    assert tree == {"percent": 50.0, "standard_error": pytest.approx(50.0), "questions": 2}


# ── Scores ───────────────────────────────────────────────────────────────────


def test_task_scores_follow_sample_order():
    samples = [
        Sample(Path("a"), (Question("q", ("red",) * 10), Question("q", ("blue",) * 2 + ("red",) * 8))),
        Sample(Path("b"), (Question("q", ("no",) * 10),)),
    ]
    scores = task_scores(samples, [["Red.", "blue"], ["yes"]])
    # two matches of ten: (2 * 1/3 + 8 * 2/3) / 10
    np.testing.assert_allclose(scores, [1.0, 0.6, 0.0])


@pytest.mark.parametrize("answers", [[["yes"]], [["yes"], ["yes", "yes"]], [["yes"], []]])
def test_task_scores_with_missing_or_extra_answers_raise(answers: list[list[str]]):
    with pytest.raises(ValueError):
        task_scores(samples_of([1, 1]), answers)


def test_by_kind_gives_the_mean_of_every_named_kind():
    samples = samples_of([1], "count") + samples_of([2], "color") + samples_of([1], "count") + samples_of([1])
    result = by_kind(samples, np.array([1.0, 1.0, 0.5, 0.0, 0.25]))
    assert list(result.items()) == [("color", 75.0), ("count", 50.0)]


def test_by_kind_without_kinds_is_empty():
    assert by_kind(samples_of([2, 1]), np.ones(3)) == {}


def test_agreement_scores_compare_texts_in_sample_order():
    scores = agreement_scores([["a", "b"], ["c"], []], [["a", "B"], ["c"], []])
    np.testing.assert_array_equal(scores, [1.0, 0.0, 1.0])


@pytest.mark.parametrize("reference", [[["a"]], [["a", "b"], ["c", "d"]]])
def test_agreement_scores_of_unequal_lists_raise(reference: list[list[str]]):
    with pytest.raises(ValueError):
        agreement_scores([["a", "b"], ["c"]], reference)
