"""Multiple choice, yes and no, exact match: figures of hand-made cases from the official definitions."""

from __future__ import annotations

import numpy as np
import pytest

from infoprune_export.data.formats import FORMATS, format_of
from infoprune_export.data.metrics.choices import mmbench_letter, scienceqa_letter
from infoprune_export.data.metrics.exact import gqa_match
from infoprune_export.data.metrics.yes_no import (
    COGNITION,
    PERCEPTION,
    confusion_figures,
    mme_answer,
    mme_figures,
    pope_answer,
    pope_figures,
)
from infoprune_export.data.samples import Question

# ── POPE ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("NO", "yes"),
        ("No.", "no"),
        ("No, there is a dog", "no"),
        ("There is not", "no"),
        ("Nothing", "yes"),
        ("Yes. There is no dog", "yes"),
        ("I know", "yes"),
        ("", "yes"),
        ("no\n", "yes"),
    ],
)
def test_pope_reads_the_first_sentence(text, expected):
    assert pope_answer(text) == expected


def test_confusion_figures_by_hand():
    # 3 hits, 1 false alarm, 2 misses, 4 correct rejections
    said = ["yes"] * 4 + ["no"] * 6
    meant = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    assert confusion_figures(said, meant) == pytest.approx(
        {"accuracy": 70, "precision": 75, "recall": 60, "f1": 100 * 2 * 0.75 * 0.6 / 1.35, "yes_ratio": 40}
    )


def test_confusion_figures_without_any_yes_are_zero():
    assert confusion_figures(["no", "no"], ["no", "yes"]) == {
        "accuracy": 50,
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0,
    }


def test_pope_averages_categories_not_questions():
    said, meant = ["yes", "no", "yes", "yes"], ["yes", "yes", "yes", "no"]
    figures = pope_figures(said, meant, ["random", "popular", "popular", "popular"])
    assert figures["random/accuracy"] == 100
    assert figures["popular/accuracy"] == pytest.approx(100 / 3)
    assert figures["mean/accuracy"] == pytest.approx((100 + 100 / 3) / 2)
    assert figures["popular/precision"] == pytest.approx(50)
    assert figures["popular/recall"] == pytest.approx(50)
    assert figures["mean/f1"] == pytest.approx(75)
    assert figures["popular/yes_ratio"] == pytest.approx(200 / 3)


# ── MME ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("YES, it is", "yes"),
        ("no.", "no"),
        ("not", "no"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("I say yes", "other"),
        ("Nope", "no"),
        ("anno", "no"),
        ("", "other"),
        ("maybe no", "other"),
    ],
)
def test_mme_reads_four_characters(text, expected):
    assert mme_answer(text) == expected


def test_mme_figures_by_hand():
    # existence: images a (both right), b (one right); code_reasoning: image c (both right)
    right = np.array([1, 1, 1, 0, 1, 1], float)
    figures = mme_figures(right, ["existence"] * 4 + ["code_reasoning"] * 2, ["a", "a", "b", "b", "c", "c"])
    assert figures["existence"] == pytest.approx(75 + 50)
    assert figures["code_reasoning"] == pytest.approx(200)
    assert (figures["perception"], figures["cognition"], figures["total"]) == (125, 200, 325)


def test_mme_of_all_right_answers_is_2000_and_800():
    subtasks = [name for name in (*PERCEPTION, *COGNITION) for _ in range(4)]
    images = [f"{name}{i // 2}" for name in (*PERCEPTION, *COGNITION) for i in range(4)]
    figures = mme_figures(np.ones(len(subtasks)), subtasks, images)
    assert (figures["perception"], figures["cognition"], figures["total"]) == (2000, 800, 2800)


# ── Choices ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        (" B \n", ""),
        ("B ", "B"),
        ("C. the dog", "C"),
        ("C.", ""),
        ("C.dog", ""),
        ("The answer is B.", "B"),
        ("So. The answer is B", "B"),
        ("The answer is B, no: The answer is C.", "C"),
        ("The answer is E.", ""),
        ("D", ""),
        ("E. x", ""),
        ("b", ""),
        ("A\nbecause", "A"),
        ("the answer is A.", ""),
        ("(A)", ""),
        ("", ""),
    ],
)
def test_scienceqa_letters_of_three_choices(text, expected):
    assert scienceqa_letter(text, 3) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("B. cat", "B"),
        ("The answer is C.", "C"),
        ("A or B", ""),
        ("A cat", "A"),
        ("A small bird sits in a cat", "B"),
        ("a dog", "A"),
        ("The CAT!", "B"),
        ("dog and cat", ""),
        ("Z", ""),
        ("D", ""),
        ("E", ""),
        ("", ""),
        ("B is right here in it all", ""),
    ],
)
def test_mmbench_letters_then_texts(text, expected):
    assert mmbench_letter(text, ("dog", "cat", "red car")) == expected


def rotated(item: int, right: str, category: str = "shape") -> list[Question]:
    """Two rows of an item, options swapped."""
    other = {"A": "B", "B": "A"}[right]
    return [
        Question("q", (right,), category, str(item), ("dog", "cat"), str(item)),
        Question("q", (other,), category, str(item + 1_000_000), ("cat", "dog"), str(item)),
    ]


def test_mmbench_counts_items_that_are_right_in_every_rotation():
    questions = [*rotated(1, "A"), *rotated(2, "B"), Question("q", ("A",), "color", "3", ("x", "y"), "3")]
    known = format_of("mmbench")
    answers = ["A", "B", "B", "B", "A"]  # item 2's second row is wrong
    scores = known.score(questions, answers)
    assert scores.tolist() == [1, 1, 0, 0, 1]
    figures = known.figures(questions, answers, scores)
    assert figures["accuracy"] == pytest.approx(200 / 3)
    assert figures["accuracy_of_rows"] == pytest.approx(80)
    assert (figures["category/shape"], figures["category/color"]) == (50, 100)


def test_mmbench_does_not_depend_on_the_order_of_rows():
    questions = [*rotated(1, "A"), *rotated(2, "B")]
    order = [0, 2, 1, 3]
    scores = format_of("mmbench").score([questions[i] for i in order], ["A", "B", "B", "B"])
    assert scores.tolist() == [1, 0, 1, 0]


# ── GQA, and all ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "right"), [("Dog", 1), ("dog.", 1), ("dog..", 1), ("dogs", 0), (" dog", 0), ("the dog", 0), ("", 0)]
)
def test_gqa_is_exact(text, right):
    assert gqa_match(text, "dog") == right


def test_gqa_parts_are_open_and_binary():
    known = format_of("gqa")
    questions = [Question("q", ("dog",), kind) for kind in ("query", "verify", "logical", "query")]
    answers = ["dog", "Dog.", "cat", "cat"]
    figures = known.figures(questions, answers, known.score(questions, answers))
    assert figures == {"accuracy": 50, "open": 50, "binary": 50}


@pytest.mark.parametrize("name", FORMATS)
def test_scores_are_one_per_question_in_0_to_1_and_figures_are_plain(name):
    right = "A" if name in ("mmbench", "mmbench_cn", "scienceqa") else "Yes" if name == "mme" else "yes"
    questions = [Question("q", (right,) * 10, "existence", str(i), ("x", "y"), str(i)) for i in range(5)]
    known = format_of(name)
    assert known.name == name
    said = [right] * 3 + ["no B"] * 2
    scores = known.score(questions, said)
    assert scores.dtype == np.float64
    assert scores.tolist() == [1, 1, 1, 0, 0]
    figures = known.figures(questions, said, scores)
    assert all(type(value) is float or type(value) is int for value in figures.values())
    if "accuracy" in figures:
        assert figures["accuracy"] == pytest.approx(60)
