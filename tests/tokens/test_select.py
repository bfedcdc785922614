"""Token selection and merge in PyTorch against the literal listing, SciPy's pivoted QR, and hostile input."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from selections import KINDS, by_pytorch, closest_race, image, vectors

from infoprune_export.tokens.reference import literal_selection, replay, scaled_pool
from infoprune_export.tokens.select import greedy_pivots, keep_count, merge_tokens, token_select

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)


def select(features: np.ndarray, prior: np.ndarray, numerator: int, denominator: int, **options: float) -> np.ndarray:
    batch = features[None], prior[None], np.array([len(prior)])
    return by_pytorch(*batch, numerator, denominator, **options)[0]


def whole(features: torch.Tensor) -> torch.Tensor:
    """Counts of a batch [B, N, D] without padding."""
    return torch.full((features.shape[0],), features.shape[1])


def assert_sound(kept: torch.Tensor, tokens: int, keep: int) -> None:
    """Exactly `keep` different ascending indices in range, for every image."""
    assert kept.shape[1] == keep
    assert ((kept >= 0) & (kept < tokens)).all()
    assert (kept[:, 1:] > kept[:, :-1]).all(), kept


# ── Budget ───────────────────────────────────────────────────────────────────


@REPEATABLE
@given(st.integers(1, 10**12), st.integers(1, 10_000), st.integers(1, 10_000))
def test_keep_count_is_the_exact_ceiling(tokens: int, numerator: int, denominator: int):
    assert keep_count(tokens, numerator, denominator) == math.ceil(Fraction(tokens * numerator, denominator))


@pytest.mark.parametrize(("ratio", "expected"), [((64, 576), 64), ((1, 3), 192), ((1, 576), 1), ((7, 10), 404)])
def test_keep_count_of_llava_tokens_is_known(ratio: tuple[int, int], expected: int):
    assert keep_count(576, *ratio) == expected


# ── Against the literal listing ──────────────────────────────────────────────


@REPEATABLE
@given(st.integers(0, 10**6), st.integers(2, 24), st.integers(1, 23), st.sampled_from([1.0, 1.25, 2.0, 9.0]))
def test_token_select_equals_literal_listing_where_no_race_is_close(seed: int, tokens: int, keep: int, factor: float):
    assume(keep <= tokens)
    features, prior = image(seed, tokens, 16)
    assume(closest_race(features, prior, keep, factor) > 1e-4)
    expected = sorted(literal_selection(features, prior, keep, tokens, factor))
    assert select(features, prior, keep, tokens, pool_factor=factor).tolist() == expected


@pytest.mark.parametrize("keep", [1, 63, 64, 65, 100, 128])
def test_token_select_follows_a_planned_order_across_blocks(keep: int):
    # Z^T = Q R with a diagonal that falls by 5% a step and small entries above it: the pivots are the columns in order.
    size, rng = 128, np.random.default_rng(5)
    diagonal = 0.95 ** np.arange(size)
    r = np.triu(0.05 * diagonal[:, None] * rng.uniform(-1, 1, (size, size)), 1) + np.diag(diagonal)
    q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    places = rng.permutation(size)
    features = np.empty((size, size), np.float32)
    features[places] = (q @ r).T
    kept = select(features, np.zeros(size, np.float32), keep, size, pool_factor=size, epsilon=1e-7)
    assert kept.tolist() == sorted(places[:keep].tolist())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [1.25, 2.0])
def test_token_select_of_many_tokens_replays_without_a_bad_step(seed: int, factor: float):
    features, prior = image(seed, 300, 256)
    kept = select(features, prior, 1, 2, pool_factor=factor)
    assert replay(features, prior, kept, factor) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_pivots_in_float64_are_the_sequence_of_algorithm_1_and_of_pivoted_qr(kind: str):
    for seed in range(34):
        rng = np.random.default_rng(seed)
        size, width = int(rng.integers(2, 170)), int(rng.integers(2, 80))
        z = vectors(kind, rng, size, width)
        keep = int(rng.integers(1, np.linalg.matrix_rank(z) + 1))
        everything = torch.ones(1, size, dtype=torch.bool)
        pivots = greedy_pivots(torch.from_numpy(z)[None], everything, keep, 1e-12)[0].tolist()
        assert pivots == literal_selection(z, np.zeros(size), keep, size, size, epsilon=1e-12)
        assert pivots == scipy.linalg.qr(z.T, mode="r", pivoting=True)[1][:keep].tolist()


def test_pivots_of_each_image_are_inside_it():
    z = torch.from_numpy(np.stack([image(seed, 30, 16)[0] for seed in range(3)]))
    sizes = torch.tensor([30, 12, 9])
    together = greedy_pivots(z, torch.arange(30) < sizes[:, None], 9, 1e-5)
    for row, size in enumerate(sizes.tolist()):
        alone = greedy_pivots(z[row : row + 1, :size], torch.ones(1, size, dtype=torch.bool), 9, 1e-5)
        assert torch.equal(together[row], alone[0])


def test_pivots_behind_saturation_are_in_the_order_of_the_prior():
    z = torch.zeros(1, 8, 4)
    z[0, 5, 0], z[0, 2, 1] = 2.0, 1.0
    pivots = greedy_pivots(z, torch.ones(1, 8, dtype=torch.bool), 6, 1e-5)
    assert pivots.tolist() == [[5, 2, 0, 1, 3, 4]]


def test_token_select_uses_temperature_and_exponent_as_the_listing_does():
    features, prior = image(8, 24, 16)
    answers = set()
    for temperature, exponent in ((0.7, 0.5), (0.05, 0.5), (0.7, 4.0)):
        _, z = scaled_pool(features, prior, 8, 3.0, temperature, exponent)
        expected = sorted(literal_selection(features, prior, 1, 3, 3.0, temperature, exponent))
        kept = select(features, prior, 1, 3, pool_factor=3.0, temperature=temperature, exponent=exponent)
        assert kept.tolist() == expected
        answers.add(tuple(expected))
    assert len(answers) > 1  # the settings matter on this image


def test_token_select_never_leaves_the_pool():
    features, prior = image(4, 40, 16)
    pool = np.argsort(-prior)[: math.ceil(1.25 * 10)]
    features[np.argmin(prior)] *= 100
    assert set(select(features, prior, 1, 4, pool_factor=1.25)) <= set(pool.tolist())


# ── Degenerate input ─────────────────────────────────────────────────────────


@REPEATABLE
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.sampled_from([1.0, 1.5, 4]))
def test_token_select_is_sound_on_rank_deficient_features(seed: int, tokens: int, keep: int, rank: int, factor: float):
    assume(keep <= tokens)
    rng = np.random.default_rng(seed)
    features = (rng.integers(-2, 3, (tokens, rank)) @ rng.integers(-2, 3, (rank, 5))).astype(np.float32)
    prior = rng.integers(0, 3, tokens).astype(np.float32)
    kept = select(features, prior, keep, tokens, pool_factor=factor)
    assert_sound(torch.from_numpy(kept)[None], tokens, keep)


@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_token_select_of_everything_is_everything(tokens: int):
    features, prior = image(1, tokens, 8)
    assert select(features, prior, 1, 1).tolist() == list(range(tokens))


def test_token_select_of_one_is_the_largest_weighted_norm():
    features = np.array([[1.0, 0], [0, 3.0], [2.0, 0], [0, 9.0]], np.float32)
    prior = np.array([0.5, 0.4, 0.3, 0.0], np.float32)
    assert select(features, prior, 1, 4, pool_factor=3.0).tolist() == [1]
    assert select(features, prior, 1, 4, pool_factor=4.0).tolist() == [3]
    assert select(features, prior, 1, 4, pool_factor=1.0).tolist() == [0]


def test_token_select_of_zero_features_fills_by_prior():
    prior = np.array([0.1, 0.9, 0.3, 0.8, 0.2], np.float32)
    assert select(np.zeros((5, 4), np.float32), prior, 2, 5).tolist() == [1, 3]


def test_token_select_of_equal_tokens_takes_the_lowest_indices():
    assert select(np.ones((9, 4), np.float32), np.zeros(9, np.float32), 4, 9).tolist() == [0, 1, 2, 3]
    many = select(np.ones((600, 4), np.float32), np.zeros(600, np.float32), 1, 2)  # a sort this long shows if unstable
    assert many.tolist() == list(range(300))


def test_token_select_skips_copies_until_the_span_is_complete():
    features = np.array([[2, 0], [2, 0], [2, 0], [0, 1]], np.float32)
    assert select(features, np.zeros(4, np.float32), 2, 4).tolist() == [0, 3]
    assert select(features, np.zeros(4, np.float32), 3, 4).tolist() == [0, 1, 3]


def test_token_select_fills_saturated_slots_by_prior():
    features = np.zeros((6, 4), np.float32)
    features[0, 0] = 1.0
    prior = np.array([0.0, 0.1, 0.5, 0.2, 0.4, 0.3], np.float32)
    assert select(features, prior, 3, 6).tolist() == [0, 2, 4]
    assert sorted(literal_selection(features, prior, 3, 6)) == [0, 2, 4]


def test_token_select_saturates_relative_to_the_largest_norm():
    features = np.diag([1.0, 0.1, 0.1]).astype(np.float32)
    features[2, 2] = 0.05
    prior = np.array([0.0, 0.0, 0.01], np.float32)
    assert select(features, prior, 2, 3).tolist() == [0, 1]
    assert select(1e-6 * features, prior, 2, 3).tolist() == [0, 1]
    assert select(features, prior, 2, 3, epsilon=0.05).tolist() == [0, 2]


def test_token_select_counts_nan_features_as_zero():
    features, prior = image(2, 20, 8)
    clean = features.copy()
    features[3, 1], clean[3, 1] = math.nan, 0.0
    features[7], clean[7] = math.nan, 0.0
    expected = select(clean, prior, 1, 2)
    assert select(features, prior, 1, 2).tolist() == expected.tolist()
    nothing = select(np.full_like(features, math.nan), prior, 1, 2)
    assert nothing.tolist() == sorted(np.argsort(-prior)[:10])


def test_token_select_counts_nan_prior_as_zero():
    features, prior = image(2, 20, 8)
    clean = prior.copy()
    prior[4], clean[4] = math.nan, 0.0
    assert select(features, prior, 1, 2).tolist() == select(features, clean, 1, 2).tolist()
    kept = select(features, np.full_like(prior, math.nan), 1, 2)
    assert_sound(torch.from_numpy(kept)[None], 20, 10)
    assert kept.tolist() == select(features, np.zeros(20, np.float32), 1, 2).tolist()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_token_select_is_sound_on_infinite_features(value: float):
    features, prior = (torch.from_numpy(array)[None] for array in image(2, 20, 8))
    features[0, int(prior[0].argmax()), 3] = value
    assert_sound(token_select(features, prior, whole(features), 1, 2), 20, 10)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_token_select_is_sound_on_an_infinite_prior(value: float):
    features, prior = (torch.from_numpy(array)[None] for array in image(2, 20, 8))
    prior[0, 5] = value
    assert_sound(token_select(features, prior, whole(features), 1, 2), 20, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_token_select_computes_in_fp32_on_narrower_features(dtype: torch.dtype):
    features, prior = (torch.from_numpy(array)[None].to(dtype) for array in image(6, 90, 48))
    # squares of 300 overflow fp16
    kept = token_select(300 * features, prior, whole(features), 1, 2)
    assert_sound(kept, 90, 45)
    assert torch.equal(kept, token_select((300 * features).float(), prior.float(), whole(features), 1, 2))


def test_token_select_computes_in_float64_on_float64_features():
    features = np.array([[1.0, 0.0], [1.0 + 1e-12, 0.0], [0.0, 0.5]])
    assert select(features, np.zeros(3, np.float32), 1, 3, pool_factor=3).tolist() == [1]
    assert select(features.astype(np.float32), np.zeros(3, np.float32), 1, 3, pool_factor=3).tolist() == [0]


def test_token_select_of_a_batch_equals_one_by_one():
    images = [image(seed, 80, 32) for seed in range(3)]
    images += [(np.zeros((80, 32), np.float32), images[0][1]), (np.ones((80, 32), np.float32), images[1][1])]
    features, prior = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*images, strict=True))
    together = token_select(features, prior, whole(features), 7, 8)
    assert_sound(together, 80, 70)
    for row, one in enumerate(images):
        assert together[row].tolist() == select(*one, 7, 8).tolist()


def test_token_select_leaves_its_inputs_alone():
    features, prior = (torch.from_numpy(array)[None] for array in image(2, 20, 8))
    prior[0, 1] = math.nan
    counts = torch.tensor([17])
    before = features.clone(), prior.clone(), counts.clone()
    token_select(features, prior, counts, 1, 2)
    torch.testing.assert_close((features, prior, counts), before, equal_nan=True, rtol=0, atol=0)


def test_token_select_shape_is_known_without_running():
    with torch.device("meta"):
        kept = token_select(torch.empty(3, 577, 8), torch.empty(3, 577), torch.empty(3, dtype=torch.int64), 1, 9)
    assert (kept.shape, kept.dtype) == ((3, 65), torch.int64)


# ── Merge ────────────────────────────────────────────────────────────────────


def merged_literally(x: np.ndarray, kept: list[int], inertia: float, above: float = -1.0) -> np.ndarray:
    """Algorithm 1, lines 24-33, for one image; dropped tokens of less similarity than `above` are lost."""
    sums, counts = {s: inertia * x[s] for s in kept}, dict.fromkeys(kept, inertia)
    for j in range(len(x)):
        if j not in kept:
            cosines = [x[j] @ x[s] / (np.linalg.norm(x[j]) * np.linalg.norm(x[s])) for s in kept]
            if max(cosines) < above:
                continue
            nearest = kept[int(np.argmax(cosines))]
            sums[nearest] = sums[nearest] + x[j]
            counts[nearest] += 1
    return np.stack([sums[s] / counts[s] for s in kept])


@pytest.mark.parametrize("inertia", [0.5, 1.0, 8.0])
def test_merge_tokens_equals_a_literal_loop(inertia: float):
    features = np.stack([image(seed, 20, 6)[0] for seed in range(3)])
    kept = [[0, 3, 4, 19], [1, 2, 10, 11], [5, 6, 7, 8]]
    x = torch.from_numpy(features)
    merged = merge_tokens(x, torch.tensor(kept), whole(x), inertia).numpy()
    for row in range(3):
        expected = merged_literally(features[row].astype(np.float64), kept[row], inertia)
        np.testing.assert_allclose(merged[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("above", [0.0, 0.4, 0.9])
def test_merge_tokens_loses_what_is_not_similar_enough(above: float):
    features, kept = image(3, 40, 5)[0], [2, 9, 30]
    x = torch.from_numpy(features)[None]
    merged = merge_tokens(x, torch.tensor([kept]), whole(x), 1.0, above)[0].numpy()
    expected = merged_literally(features.astype(np.float64), kept, 1.0, above)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected - merged_literally(features.astype(np.float64), kept, 1.0)).max() > 0.01  # some are lost


def test_merge_tokens_of_unequal_images_are_those_of_each_alone():
    features = np.stack([image(seed, 20, 6)[0] for seed in range(4)])
    kept = torch.tensor([[0, 3, 4, 19], [1, 2, -1, -1], [5, -1, -1, -1], [-1, -1, -1, -1]])
    counts = torch.tensor([20, 11, 6, 0])
    for row, count in enumerate(counts.tolist()):
        features[row, count:] = 1e3 * features[row, :1]  # would attract and weigh much
    merged = merge_tokens(torch.from_numpy(features), kept, counts, 1.0)
    assert merged.shape == (4, 4, 6)
    assert merged.isfinite().all()
    for row, count in enumerate(counts.tolist()):
        own = kept[row][kept[row] >= 0].tolist()
        if own:
            expected = merged_literally(features[row, :count].astype(np.float64), own, 1.0)
            np.testing.assert_allclose(merged[row, : len(own)].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_merge_tokens_keeping_all_is_identity():
    features = torch.from_numpy(image(0, 12, 6)[0])[None]
    features[0, 3] = features[0, 2]  # a copy must not be folded into its twin
    torch.testing.assert_close(merge_tokens(features, torch.arange(12)[None], whole(features), 1.0), features)


def test_merge_tokens_with_huge_inertia_leaves_kept_tokens():
    features = torch.from_numpy(image(0, 12, 6)[0])[None]
    kept = torch.tensor([[1, 5, 9]])
    heavy, light = (merge_tokens(features, kept, whole(features), inertia) for inertia in (1e7, 1.0))
    torch.testing.assert_close(heavy, features[:, kept[0]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(light, features[:, kept[0]], atol=0.1)


def test_merge_tokens_matches_direction_and_not_length():
    features = torch.tensor([[[1.0, 0.0], [0.0, 100.0], [4.0, 3.0]]])
    merged = merge_tokens(features, torch.tensor([[0, 1]]), whole(features), 1.0)
    torch.testing.assert_close(merged, torch.tensor([[[2.5, 1.5], [0.0, 100.0]]]))


def test_merge_tokens_of_zero_features_is_finite():
    merged = merge_tokens(torch.zeros(1, 5, 4), torch.tensor([[0, 2]]), torch.tensor([5]), 1.0)
    assert merged.tolist() == torch.zeros(1, 2, 4).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merge_tokens_keeps_the_dtype(dtype: torch.dtype):
    features = torch.from_numpy(image(0, 12, 6)[0])[None].to(dtype)
    merged = merge_tokens(features, torch.tensor([[1, 5, 9]]), whole(features), 1.0)
    assert merged.dtype == dtype
    expected = merge_tokens(features.float(), torch.tensor([[1, 5, 9]]), whole(features), 1.0)
    torch.testing.assert_close(merged.float(), expected, rtol=1e-3, atol=1e-3)
