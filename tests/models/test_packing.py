"""Planning against the functions that transformers plans with, over grids of any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils

from infoprune_export.errors import InfopruneError
from infoprune_export.models import packing
from infoprune_export.models.attention import Segments, attend, attend_packed

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=40)

merges = st.sampled_from([1, 2, 3])
# Frames, and sides in visual tokens: single rows and columns, and long strips, included.
sides = st.integers(1, 9) | st.just(31)
token_grids = st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=4)


def patches(grids, merge):
    return [(frames, rows * merge, columns * merge) for frames, rows, columns in grids]


def total(grids):
    return sum(frames * rows * columns for frames, rows, columns in grids)


def spans(cumulative):
    """Lengths of the segments between cumulative ends."""
    return np.diff(cumulative.numpy()).tolist()


@REPEATABLE
@given(token_grids, merges)
def test_patch_positions_equal_transformers(grids, merge):
    grids = patches(grids, merge)
    expected = vision_utils.get_vision_position_ids(torch.tensor(grids), merge)
    np.testing.assert_array_equal(packing.patch_positions(grids, merge), expected)


@REPEATABLE
@given(token_grids)
def test_frame_segments_equal_cumulative_lengths(grids):
    grids = patches(grids, 2)
    segments = list(packing.frame_segments(grids))
    assert [len(segment) for segment in segments] == spans(vision_utils.get_vision_cu_seqlens(torch.tensor(grids)))
    np.testing.assert_array_equal(np.concatenate(segments), np.arange(total(grids)))


@REPEATABLE
@given(token_grids, merges, st.integers(1, 5))
def test_window_segments_equal_transformers_permuted_windows(grids, merge, window):
    """Theirs permute the visual tokens and cut the sequence; ours name the patches of each piece."""
    grids = patches(grids, merge)
    patch_size = 7
    index, cumulative = vision_utils.get_vision_window_index(
        torch.tensor(grids), merge, window * merge * patch_size, patch_size
    )
    permuted = (index[:, None] * merge**2 + torch.arange(merge**2)).flatten().numpy()
    expected = np.split(permuted, cumulative[1:-1].tolist())
    actual = list(packing.window_segments(grids, merge, window))
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@REPEATABLE
@given(token_grids, merges, st.integers(2, 48))
def test_bilinear_places_equal_transformers(grids, merge, side):
    grids = patches(grids, merge)
    theirs = vision_utils.get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), side, align_corners=True, spatial_merge_size=merge
    )
    index, weight = packing.bilinear_places(grids, merge, side)
    assert (index.dtype, weight.dtype) == (np.int64, np.float32)
    assert 0 <= index.min() <= index.max() < side**2
    # A place next to an entry may be split either way around it, so the tables they stand for are compared.
    table = np.random.default_rng(0).normal(size=(side**2, 3))
    expected = (table[theirs[0].numpy()] * theirs[1].numpy()[..., None]).sum(1)
    np.testing.assert_allclose((table[index] * weight[..., None]).sum(1), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(weight.sum(1), 1, rtol=0, atol=1e-6)


def test_bilinear_places_of_the_tables_own_grid_are_its_entries():
    index, weight = packing.bilinear_places([(1, 6, 6)], 1, 6)
    table = np.arange(36.0)
    np.testing.assert_allclose((table[index] * weight).sum(1), table, atol=1e-5)


# ── Padded gathers ──


@st.composite
def partitions(draw):
    """0..P-1 in any order, cut into non-empty segments."""
    order = np.array(draw(st.permutations(range(draw(st.integers(1, 40))))))
    cuts = draw(st.sets(st.integers(1, len(order) - 1))) if len(order) > 1 else set()
    return np.split(order, sorted(cuts))


@REPEATABLE
@given(partitions(), st.integers(0, 5))
def test_padded_gather_is_undone_by_its_inverse(segments, slack):
    length = max(map(len, segments)) + slack if slack else None
    count = sum(map(len, segments))
    index, inverse = packing.padded_gather(segments, length)
    assert index.shape == (len(segments), length or max(map(len, segments)))
    np.testing.assert_array_equal(index.ravel()[inverse], np.arange(count))
    assert (index == count).sum() == index.size - count  # the rest is padding
    for row, segment in zip(index, segments, strict=True):
        np.testing.assert_array_equal(row[: len(segment)], segment)


@REPEATABLE
@given(partitions(), st.integers(0, 3), st.sampled_from([torch.float32, torch.float16]))
def test_attention_in_segments_equals_attention_of_each_alone(segments, slack, dtype):
    count = sum(map(len, segments))
    length = max(map(len, segments)) + slack
    index, inverse = map(torch.from_numpy, packing.padded_gather(segments, length))
    fused = torch.randn(count, 3, 2, 4, generator=torch.Generator().manual_seed(count)).mul(3).to(dtype)
    actual = attend_packed(fused, Segments.of(index, inverse, dtype))
    for segment in map(torch.from_numpy, segments):
        expected = attend(*(x[None] for x in fused[segment].unbind(1)))[0]
        torch.testing.assert_close(actual[segment], expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)


# ── Refusals ──


@pytest.mark.parametrize(
    ("grid", "shown"),
    [((0, 4, 4), "0 x 4 x 4"), ((1, 0, 4), "1 x 0 x 4"), ((1, 4, -2), "1 x 4 x -2"), ((1, 5, 4), "1 x 5 x 4")],
)
def test_an_impossible_grid_is_refused_with_its_image(grid, shown):
    with pytest.raises(InfopruneError, match=rf"image 1 has a grid of {shown} patches; .* multiples of 2"):
        packing.check_grids([(1, 4, 4), grid], 2, 16)


@pytest.mark.parametrize("count", [0, 15, 17])
def test_grids_that_do_not_add_up_are_refused(count):
    with pytest.raises(InfopruneError, match=rf"{count} patches, image_grid_thw stands for 16"):
        packing.check_grids([(1, 2, 4), (2, 2, 2)], 2, count)


def test_possible_grids_pass():
    packing.check_grids([(1, 2, 4), (2, 2, 2)], 2, 16)
