"""Procedural scenes: reproducible, physically possible, and with answers that follow from what is drawn."""

from __future__ import annotations

import itertools
import re
from typing import Literal

import numpy as np
import pytest

from infoprune_export.data import scenes
from infoprune_export.data.scenes import (
    COLORS,
    IMAGE_SIZE,
    MIXED_SIZES,
    QUESTION_KINDS,
    SHAPES,
    WORDS,
    Item,
    Question,
    Scene,
)
from infoprune_export.data.testbed import vocabulary

COUNT = 200
SEED = 11


@pytest.fixture(scope="module", params=["square", "mixed"])
def sizes(request: pytest.FixtureRequest) -> Literal["square", "mixed"]:
    return request.param


@pytest.fixture(scope="module")
def composed(sizes: Literal["square", "mixed"]) -> list[Scene]:
    """Contents without pictures, which is what takes the time."""
    every = [(IMAGE_SIZE, IMAGE_SIZE) if sizes == "square" else scenes.mixed_size(SEED, i) for i in range(COUNT)]
    return [scenes.compose(np.random.default_rng([SEED, i]), *size) for i, size in enumerate(every)]


@pytest.fixture(scope="module")
def asked(composed: list[Scene]) -> list[list[Question]]:
    return [scenes.ask(scene, np.random.default_rng([SEED, i, 1]), 12) for i, scene in enumerate(composed)]


# ── Reproducibility ──────────────────────────────────────────────────────────


def test_scene_at_is_the_same_alone_and_among_others():
    scene, image = scenes.scene_at(SEED, 3)
    among = [scenes.scene_at(SEED, index) for index in range(5)]
    assert among[3][0] == scene
    np.testing.assert_array_equal(np.asarray(among[3][1]), np.asarray(image))


def test_scene_at_does_not_depend_on_global_random_state():
    np.random.seed(0)  # noqa: NPY002
    first = np.asarray(scenes.scene_at(SEED, 7)[1])
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(np.asarray(scenes.scene_at(SEED, 7)[1]), first)


def test_scene_at_draws_what_compose_composes(composed: list[Scene], sizes: Literal["square", "mixed"]):
    assert [scenes.scene_at(SEED, index, sizes)[0] for index in range(3)] == composed[:3]


def test_scenes_of_other_seed_or_index_differ(composed: list[Scene], sizes: Literal["square", "mixed"]):
    assert len(set(composed)) == COUNT
    assert scenes.scene_at(SEED + 1, 0, sizes)[0] != composed[0]


def test_square_scenes_are_those_that_trained_the_shipped_checkpoint():
    """Without a sign, whose size is the font's, a scene is NumPy's doing alone."""
    scene = scenes.compose(np.random.default_rng([SEED, 2]))
    assert scene.sign is None
    found = [(item.color, item.shape) for item in scene.items]
    assert found == [("blue", "triangle"), ("yellow", "triangle"), ("green", "triangle"), ("green", "star")]
    first = scene.items[0]
    assert (first.x, first.y, first.radius, first.angle) == pytest.approx((35.831608, 101.324385, 8.871448, 1.060171))


def test_image_is_rgb_of_the_stated_size():
    _, image = scenes.scene_at(SEED, 0)
    assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))


def test_mixed_scenes_come_in_every_size():
    drawn = [scenes.scene_at(SEED, index, "mixed") for index in range(40)]
    assert all(image.size == (scene.width, scene.height) for scene, image in drawn)
    assert {image.size for _, image in drawn} == set(MIXED_SIZES)
    again = scenes.scene_at(SEED, 39, "mixed")
    assert again[0] == drawn[39][0]
    np.testing.assert_array_equal(np.asarray(again[1]), np.asarray(drawn[39][1]))


def test_most_mixed_sizes_do_not_fit_windows_of_four_cells():
    cells = [(width // 14, height // 14) for width, height in MIXED_SIZES]
    assert all(width % 14 == height % 14 == 0 for width, height in MIXED_SIZES)
    assert [c for c in cells if c[0] % 4 == c[1] % 4 == 0] == [(8, 8)]
    assert all(60 <= columns * rows <= 66 for columns, rows in cells)


def test_mixed_scenes_use_the_whole_image():
    composed = [scenes.compose(np.random.default_rng(index), 154, 84) for index in range(60)]
    assert max(item.x for scene in composed for item in scene.items) > 135
    assert max(item.y for scene in composed for item in scene.items) < 84


# ── Content ──────────────────────────────────────────────────────────────────


def boxes(scene: Scene) -> list[tuple[float, float, float, float]]:
    found = [(i.x - i.radius, i.y - i.radius, i.x + i.radius, i.y + i.radius) for i in scene.items]
    if (s := scene.sign) is not None:
        found.append((s.x - s.width / 2, s.y - s.height / 2, s.x + s.width / 2, s.y + s.height / 2))
    return found


def test_everything_lies_inside_the_image(composed: list[Scene]):
    for scene in composed:
        for x0, y0, x1, y1 in boxes(scene):
            assert 0 <= x0 < x1 <= scene.width
            assert 0 <= y0 < y1 <= scene.height


def test_nothing_overlaps(composed: list[Scene]):
    for scene in composed:
        for a, b in itertools.combinations(boxes(scene), 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_scenes_hold_different_objects_of_known_kinds(composed: list[Scene]):
    for scene in composed:
        assert len(scene.items) <= 5
        assert len({(item.shape, item.color) for item in scene.items}) == len(scene.items)
        assert all(item.shape in SHAPES and item.color in COLORS for item in scene.items)
    assert {item.shape for scene in composed for item in scene.items} == set(SHAPES)
    assert {item.color for scene in composed for item in scene.items} == set(COLORS)
    assert {len(scene.items) for scene in composed} >= {2, 3, 4, 5}


def test_signs_carry_words_and_two_digit_numbers(composed: list[Scene]):
    signs = [scene.sign for scene in composed if scene.sign is not None]
    assert 0.6 < len(signs) / COUNT < 0.8
    assert all(sign.text in WORDS or re.fullmatch("[1-9][0-9]", sign.text) for sign in signs)
    assert 0.35 < sum(sign.is_number for sign in signs) / len(signs) < 0.65


def test_drawn_colors_are_those_of_the_content(sizes: Literal["square", "mixed"]):
    for index in range(25):
        scene, image = scenes.scene_at(SEED, index, sizes)
        pixels = np.asarray(image, float)
        for item in scene.items:
            if item.shape == "ring":
                continue  # hollow where it is looked at
            x, y = int(item.x), int(item.y)
            seen = pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
            assert min(COLORS, key=lambda name: np.linalg.norm(seen - COLORS[name])) == item.color


def test_ring_is_hollow_and_circle_is_not():
    def center(shape: str) -> np.ndarray:
        scene = Scene((Item(shape, "red", 56.0, 56.0, 10.0, 0.0),), None)
        return np.asarray(scenes.render(scene, np.random.default_rng(2)), float)[54:58, 54:58].mean((0, 1))

    red = np.array(COLORS["red"])
    assert np.linalg.norm(center("circle") - red) < 60
    assert np.linalg.norm(center("ring") - red) > 60


# ── Questions ────────────────────────────────────────────────────────────────


def named(scene: Scene, name: str) -> Item:
    """The only item that a name such as ``circle`` or ``red circle`` fits."""
    *color, shape = name.split()
    (item,) = [i for i in scene.items if i.shape == shape and (not color or i.color == color[0])]
    return item


def fits(scene: Scene, description: str) -> int:
    """How many items have all of these properties."""
    return sum(all(word in (item.shape, item.color) for word in description.split()) for item in scene.items)


def lies(a: Item, b: Item) -> str:
    """Where a is, seen from b; y grows downwards."""
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def solve(scene: Scene, kind: str, text: str) -> str:
    """The answer, from the question's words and the scene's content alone."""
    if kind == "color":
        return named(scene, re.fullmatch(r"What color is the (.+)\?", text)[1]).color
    if kind == "shape":
        color = re.fullmatch(r"What shape is the (.+) object\?", text)[1]
        (item,) = [i for i in scene.items if i.color == color]
        return item.shape
    if kind == "count":
        return str(fits(scene, re.fullmatch(r"How many (.*)objects are there\?", text)[1]))
    if kind == "existence":
        return "yes" if fits(scene, re.fullmatch(r"Is there a (.+) in the image\?", text)[1]) else "no"
    if kind == "side":
        item = named(scene, re.fullmatch(r"Which side is the (.+) on\?", text)[1])
        return "left" if item.x < scene.width / 2 else "right"
    if kind == "text":
        assert scene.sign is not None
        assert re.fullmatch(r"What (number|word) is on the sign\?", text)[1] == (
            "number" if scene.sign.text.isdecimal() else "word"
        )
        return scene.sign.text
    assert kind == "relation"
    if match := re.fullmatch(r"Which direction is the (.+) from the (.+)\?", text):
        return lies(named(scene, match[1]), named(scene, match[2]))
    match = re.fullmatch(r"Is the (.+) (left|right|above|below) the (.+)\?", text)
    return "yes" if lies(named(scene, match[1]), named(scene, match[3])) == match[2] else "no"


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_follow_from_the_content(composed: list[Scene], asked: list[list[Question]], kind: str):
    answers = set()
    for scene, questions in zip(composed, asked, strict=True):
        for question in questions:
            if question.kind == kind:
                assert question.answer == solve(scene, kind, question.text), (question, scene)
                answers.add(question.answer)
    assert len(answers) > 1


def test_related_objects_lie_clearly_apart(composed: list[Scene], asked: list[list[Question]]):
    for scene, questions in zip(composed, asked, strict=True):
        for question in questions:
            if match := re.fullmatch(r"Which direction is the (.+) from the (.+)\?", question.text):
                a, b = named(scene, match[1]), named(scene, match[2])
                small, large = sorted((abs(a.x - b.x), abs(a.y - b.y)))
                assert large >= 16
                assert large > 1.3 * small


def test_questions_of_a_scene_are_different_and_within_the_count(asked: list[list[Question]]):
    for questions in asked:
        assert len({question.text for question in questions}) == len(questions)
        assert len(questions) <= 12
    assert sum(len(questions) == 12 for questions in asked) > 0.8 * COUNT


def test_yes_and_no_are_about_as_frequent(asked: list[list[Question]]):
    answers = [q.answer for questions in asked for q in questions if q.kind == "existence"]
    assert len(answers) > 150
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_every_word_is_in_the_testbeds_vocabulary(asked: list[list[Question]]):
    known = vocabulary()
    for question in itertools.chain.from_iterable(asked):
        assert all(word in known for word in re.findall(r"\w+|[?.,]", question.text.lower()))
        assert question.answer.isdecimal() or question.answer in known


def test_ask_is_reproducible(composed: list[Scene], asked: list[list[Question]]):
    assert scenes.ask(composed[4], np.random.default_rng([SEED, 4, 1]), 12) == asked[4]


def test_ask_of_each_kind_comes_first(composed: list[Scene]):
    scene = next(scene for scene in composed if scene.sign is not None and len(scene.items) == 5)
    kinds = [question.kind for question in scenes.ask(scene, np.random.default_rng(0), 7)]
    assert kinds[:2] == ["color", "shape"]
    assert len(set(kinds)) >= 6


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ask_stops_at_the_count(composed: list[Scene], count: int):
    assert len(scenes.ask(composed[0], np.random.default_rng(0), count)) == count


def test_ask_of_an_empty_scene_asks_nothing():
    assert scenes.ask(Scene((), None), np.random.default_rng(0), 7) == []


def test_two_equal_shapes_are_told_apart_by_color():
    pair = (Item("circle", "red", 20, 50, 8, 0), Item("circle", "blue", 90, 50, 8, 0))
    found = {}
    for seed in range(40):
        for question in scenes.ask(Scene(pair, None), np.random.default_rng(seed), 7):
            assert question.kind not in {"color", "side", "text"}  # "the circle" would be ambiguous
            found[question.text] = question.answer
    assert found["Which direction is the red circle from the blue circle?"] == "left"
    assert found["How many circle objects are there?"] == "2"
    assert found["Is there a red circle in the image?"] == "yes"
