"""The controls: random, stride, pool, and the smaller image that replaces selection."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from candidates import draw, given, kept, select, spec
from families import build, own_features, relative_error, seeded
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.tokens.baselines.downsample import shrink, smaller_grid
from infoprune_export.tokens.baselines.spatial import random, rectangles
from infoprune_export.tokens.encoder import VisionEncoder, check_selection

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
SHRINKING = ("llava", "llava-siglip", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")


@pytest.fixture(scope="module")
def towers():
    return {name: tower_of(build(name)) for name in (*SHRINKING, "llava-next")}


# ── Random ───────────────────────────────────────────────────────────────────


def test_random_draws_every_token_equally_often():
    selection = select(given(**draw(0, [(4, 4)] * 600, width=32)), spec("random", "1/4"))
    seen = Counter(i for row in range(600) for i in kept(selection, row))
    # 600 draws at 1/4: 150 each, standard deviation 10.6
    assert len(seen) == 16
    assert 105 < min(seen.values()) <= max(seen.values()) < 195


def test_random_differs_between_images_and_seeds_and_repeats_itself():
    candidates = given(**draw(1, [(8, 8), (8, 8)]))
    answers = [random(candidates, spec("random", "1/2"), seed).kept.tolist() for seed in (0, 0, 1, 2)]
    assert answers[0] == answers[1]
    assert len({str(row) for answer in answers for row in answer}) == 6


def test_random_is_not_moved_by_rounding():
    images = draw(2, [(8, 8)])
    before = kept(select(given(**images), spec("random")))
    images["tokens"] = images["tokens"] * (1 + 1e-5 * torch.randn(images["tokens"].shape, generator=seeded()))
    assert kept(select(given(**images), spec("random"))) == before


# ── Stride ───────────────────────────────────────────────────────────────────


@REPEATABLE
@drawn(st.integers(1, 60), st.fractions(Fraction(1, 60), 1, max_denominator=60))
def test_stride_takes_the_middles_of_equal_runs(count: int, keep: Fraction):
    budget = math.ceil(count * keep)
    middles = [math.floor(Fraction(2 * i + 1, 2) * Fraction(count, budget)) for i in range(budget)]
    tokens = torch.randn(1, count, 3, generator=seeded())
    selection = select(given(tokens), spec("stride", keep))
    assert kept(selection) == middles
    assert torch.equal(selection.tokens, tokens[:, middles])


# ── Pool ─────────────────────────────────────────────────────────────────────


@REPEATABLE
@drawn(st.integers(1, 14), st.integers(1, 14), st.data())
def test_rectangles_cover_the_grid_in_nearly_equal_parts(rows: int, columns: int, data):
    count = data.draw(st.integers(1, rows * columns))
    label, centres = rectangles(rows, columns, count)
    label = label.view(rows, columns)
    assert label.unique().tolist() == list(range(count))
    assert centres.tolist() == sorted(set(centres.tolist()))
    areas = []
    for region, centre in enumerate(centres.tolist()):
        cells = (label == region).nonzero()
        (top, left), (bottom, right) = cells.amin(0).tolist(), cells.amax(0).tolist()
        assert (bottom - top + 1) * (right - left + 1) == len(cells)  # a rectangle
        distance = np.abs(cells.numpy() - [(top + bottom) / 2, (left + right) / 2]).sum(1)
        nearest = cells[distance.argmin()]
        assert centre == nearest[0] * columns + nearest[1]
        areas.append(len(cells))
    even = rows * columns / count
    assert math.floor(even / 2.5) <= min(areas) <= max(areas) <= math.ceil(2.5 * even)


@pytest.mark.parametrize(("count", "side"), [(64, 1), (16, 2), (4, 4), (1, 8)])
def test_rectangles_of_a_square_number_are_squares(count: int, side: int):
    label, _ = rectangles(8, 8, count)
    blocks = torch.arange(count).view(8 // side, 8 // side)
    assert torch.equal(label.view(8, 8), blocks.repeat_interleave(side, 0).repeat_interleave(side, 1))


@REPEATABLE
@drawn(st.integers(0, 10**6), st.sampled_from(["1/9", "1/2", "5/6"]))
def test_pool_is_the_mean_of_each_rectangle(seed: int, keep: str):
    images = draw(seed, [(4, 6), (3, 3), (1, 20)])
    selection = select(given(**images), spec("pool", keep))
    for row, (grid, count) in enumerate(zip(images["grids"], images["counts"], strict=True)):
        label, centres = rectangles(*grid, math.ceil(count * Fraction(keep)))
        assert kept(selection, row) == centres.tolist()
        tokens = images["tokens"][row, :count].double().numpy()
        means = [tokens[(label == region).numpy()].mean(0) for region in range(len(centres))]
        np.testing.assert_allclose(selection.tokens[row, : len(means)].numpy(), means, rtol=1e-5, atol=1e-6)


# ── Downsample ───────────────────────────────────────────────────────────────


@REPEATABLE
@drawn(st.integers(1, 40), st.integers(1, 40), st.data())
def test_smaller_grid_is_the_largest_that_fits_and_keeps_the_shape(rows: int, columns: int, data):
    tokens = data.draw(st.integers(1, rows * columns))
    height, width = smaller_grid(rows, columns, tokens)
    scale = math.sqrt(tokens / (rows * columns))
    near = [
        (h, w)
        for h in range(1, rows + 1)
        for w in range(1, columns + 1)
        if h * w <= tokens and abs(h - rows * scale) < 1 and abs(w - columns * scale) < 1
    ]
    if min(rows, columns) * scale >= 1:
        assert (height, width) in near
        assert height * width == max(h * w for h, w in near)
    else:
        assert height * width == tokens
        assert height <= rows
        assert width <= columns


@pytest.mark.parametrize(
    ("grid", "tokens", "expected"),
    [((8, 8), 64, (8, 8)), ((8, 8), 32, (5, 6)), ((24, 24), 64, (8, 8)), ((6, 10), 30, (4, 7)), ((60, 1), 7, (7, 1))],
)
def test_smaller_grid_of_known_grids(grid, tokens, expected):
    assert smaller_grid(*grid, tokens) == expected


@pytest.mark.parametrize("name", SHRINKING)
def test_all_of_the_pixels_give_all_of_the_tokens(towers, name):
    tower = towers[name]
    inputs = tower.of_pictures([picture for picture, _, _ in tower.pictures(tower.example_inputs(2, seeded()))])
    with torch.no_grad():
        visual = VisionEncoder(tower, spec("downsample", 1)).encode(inputs)
    for features, layout, expected, whole in zip(
        visual.features, visual.layouts, own_features(tower.model, inputs), tower.layouts(inputs), strict=True
    ):
        assert relative_error(features, expected) <= 1e-5
        assert torch.equal(layout.ids, whole.ids)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_a_qwen_tower_sees_the_smaller_image_as_hugging_face_does(towers, name):
    tower = towers[name]
    inputs = tower.example_inputs(3, seeded())
    small, _ = shrink(tower, inputs, spec("downsample", "1/2"))
    assert small["image_grid_thw"].tolist() == [[1, 10, 12], [1, 12, 10], [1, 8, 14]]  # of 16x16, 18x14 and 12x20
    with torch.no_grad():
        visual = VisionEncoder(tower, spec("downsample", "1/2")).encode(inputs)
    for features, expected in zip(visual.features, own_features(tower.model, small), strict=True):
        assert relative_error(features, expected) <= 1e-5


@pytest.mark.parametrize("name", ["llava", "llava-siglip"])
def test_a_llava_tower_interpolates_its_positions_as_hugging_face_does(towers, name):
    tower = towers[name]
    inputs = tower.example_inputs(2, seeded())
    small, _ = shrink(tower, inputs, spec("downsample", "1/2"))
    assert small["pixel_values"].shape == (2, 3, 28, 42)  # of 56 x 56: 2 x 3 of 4 x 4 tokens
    with torch.no_grad():
        visual = VisionEncoder(tower, spec("downsample", "1/2")).encode(inputs)
        model = tower.model
        states = model.model.vision_tower(
            **small, interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states[model.config.vision_feature_layer]
        expected = model.model.multi_modal_projector(states[:, 1:] if name == "llava" else states)
    assert relative_error(torch.stack(list(visual.features)), expected) <= 1e-5


def test_a_smaller_image_shows_the_same_scene(towers):
    """Means over areas of a picture are those of the smaller picture."""
    for name in SHRINKING:
        tower = towers[name]
        inputs = tower.example_inputs(3, seeded())
        small, _ = shrink(tower, inputs, spec("downsample", "1/4"))
        for (before, *_), (after, *_) in zip(tower.pictures(inputs), tower.pictures(small), strict=True):
            coarse = [torch.nn.functional.adaptive_avg_pool2d(picture, 3) for picture in (before, after)]
            assert relative_error(coarse[1], coarse[0]) < 0.2


def test_what_is_too_fine_for_the_smaller_image_is_averaged(towers):
    noise = {"pixel_values": torch.randn(1, 3, 56, 56, generator=seeded())}
    small, _ = shrink(towers["llava"], noise, spec("downsample", "1/16"))
    # The mean of 4 x 4 pixels has a standard deviation of 1/4; single pixels, or two of them mixed, at least 1/2.
    assert small["pixel_values"].std() < 0.4


@pytest.mark.parametrize("name", SHRINKING)
def test_shrunk_tokens_stand_in_the_middles_of_their_areas(towers, name):
    tower = towers[name]
    inputs = tower.example_inputs(3, seeded())
    with torch.no_grad():
        visual = VisionEncoder(tower, spec("downsample", "1/3")).encode(inputs)
    for features, layout, whole, (_, rows, columns) in zip(
        visual.features, visual.layouts, tower.layouts(inputs), tower.pictures(inputs), strict=True
    ):
        height, width = smaller_grid(rows, columns, math.ceil(rows * columns / 3))
        cells = [
            math.floor((i + 0.5) * rows / height) * columns + math.floor((j + 0.5) * columns / width)
            for i in range(height)
            for j in range(width)
        ]
        assert len(features) == len(cells)
        assert torch.equal(layout.ids, whole.ids[:, cells])
        assert layout.advance == whole.advance


def test_shrunk_tokens_may_be_numbered_contiguously(towers):
    tower = towers["llava"]
    with torch.no_grad():
        encoder = VisionEncoder(tower, spec("downsample", "1/2", positions="contiguous"))
        visual = encoder.encode(tower.example_inputs(2, seeded()))
    assert [layout.ids.tolist() for layout in visual.layouts] == [[list(range(6))]] * 2
    assert [layout.advance for layout in visual.layouts] == [6, 6]


def test_shrinking_keeps_the_dtype(towers):
    for name in ("llava", "qwen2-vl"):
        inputs = towers[name].example_inputs(1, seeded())
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        assert shrink(towers[name], inputs, spec("downsample"))[0]["pixel_values"].dtype == torch.bfloat16


def test_tiles_and_videos_are_refused(towers):
    for attempt in (check_selection, VisionEncoder):
        with pytest.raises(InfopruneError, match="'downsample': an image has 76 visual tokens, 4 x 4 of them"):
            attempt(towers["llava-next"], spec("downsample"))
    video = towers["qwen2-vl"].grid_inputs([(2, 8, 8)], seeded())
    with pytest.raises(InfopruneError, match="'downsample': an image has 32 visual tokens, 4 x 4 of them"):
        VisionEncoder(towers["qwen2-vl"], spec("downsample")).encode(video)
