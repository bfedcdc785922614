"""Token selection and merge against the literal listing, SciPy's pivoted QR, and hostile input."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infoprune_export.tokens.reference import literal_selection, replay, scaled_pool
from infoprune_export.tokens.select import keep_count, merge_tokens, token_select

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)
Image = tuple[np.ndarray, np.ndarray]


def image(seed: int, tokens: int, width: int) -> Image:
    """Random features [N, D] and a prior [N], exactly representable in fp32."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(tokens, width)).astype(np.float32) * rng.uniform(0.3, 2, (tokens, 1)).astype(np.float32)
    return features, rng.uniform(0, 1, tokens).astype(np.float32)


def select(features: np.ndarray, prior: np.ndarray, numerator: int, denominator: int, **options: float) -> np.ndarray:
    kept = token_select(
        torch.from_numpy(features)[None], torch.from_numpy(prior)[None], numerator, denominator, **options
    )
    assert kept.dtype == torch.int64
    return kept[0].numpy()


def assert_sound(kept: torch.Tensor, tokens: int, keep: int) -> None:
    """Exactly `keep` different ascending indices in range, for every image."""
    assert kept.shape[1] == keep
    assert ((kept >= 0) & (kept < tokens)).all()
    assert (kept[:, 1:] > kept[:, :-1]).all(), kept


def closest_race(features: np.ndarray, prior: np.ndarray, keep: int, factor: float) -> float:
    """Smallest relative lead of any greedy choice over the runner-up, by Gram-Schmidt in float64; 0 if it saturates."""
    _, z = scaled_pool(features, prior, keep, factor, 0.7, 0.5)
    first, lead = (z**2).sum(1).max(), 1.0
    for _ in range(keep):
        norms = (z**2).sum(1)
        order = np.argsort(norms)
        if norms[order[-1]] <= 1e-3 * first:
            return 0.0
        if len(order) > 1:
            lead = min(lead, 1 - norms[order[-2]] / norms[order[-1]])
        direction = z[order[-1]] / np.sqrt(norms[order[-1]])
        z = np.delete(z - np.outer(z @ direction, direction), order[-1], axis=0)
    return lead


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


@pytest.mark.parametrize("seed", range(5))
def test_literal_selection_order_is_that_of_pivoted_qr(seed: int):
    features, prior = image(seed, 24, 16)
    pool, z = scaled_pool(features, prior, 12, 2.0, 0.7, 0.5)
    pivots = scipy.linalg.qr(z.T, mode="r", pivoting=True)[1]
    assert literal_selection(features, prior, 1, 2) == pool[pivots[:12]].tolist()


def test_scaled_pool_weighs_features_with_the_root_of_q():
    features, prior = image(3, 6, 4)
    q = [math.exp(a / 0.7) for a in prior.tolist()]
    q = [(value / sum(q)) ** 0.5 for value in q]
    pool, z = scaled_pool(features, prior, 2, 2.0, 0.7, 0.5)
    assert pool.tolist() == sorted(range(6), key=lambda i: -prior[i])[:4]
    np.testing.assert_allclose(z, [math.sqrt(q[i]) * features[i].astype(float) for i in pool], rtol=1e-6)


def test_token_select_never_leaves_the_pool():
    features, prior = image(4, 40, 16)
    pool = np.argsort(-prior)[: math.ceil(1.25 * 10)]
    features[np.argmin(prior)] *= 100
    assert set(select(features, prior, 1, 4, pool_factor=1.25)) <= set(pool.tolist())


# ── Replay ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_replay_of_the_literal_set_is_zero(seed: int):
    features, prior = image(seed, 40, 32)
    kept = np.array(sorted(literal_selection(features, prior, 1, 2)))
    assert replay(features, prior, kept) == pytest.approx(0, abs=1e-9)


def test_replay_of_a_worse_set_is_its_worst_step():
    features = np.diag([4.0, 3.0, 2.0, 1.0])
    prior = np.zeros(4)
    assert replay(features, prior, np.array([0, 1])) == 0.0
    assert replay(features, prior, np.array([0, 2])) == pytest.approx(1 - 4 / 9)
    assert replay(features, prior, np.array([1, 2])) == pytest.approx(1 - 4 / 16)


def test_replay_of_a_copied_token_counts_it_as_worthless():
    features = np.array([[2.0, 0], [2.0, 0], [0, 1.0]])
    assert replay(features, np.zeros(3), np.array([0, 1])) == pytest.approx(1.0)
    assert replay(features, np.zeros(3), np.array([0, 2])) == 0.0
    assert replay(features, np.zeros(3), np.array([1, 2])) == 0.0  # equal worth, other index


def test_replay_outside_the_pool_or_with_repeats_is_one():
    features, prior = image(0, 12, 8)
    pool = np.argsort(-prior)
    assert replay(features, prior, np.array([pool[0], pool[0], pool[1]])) == 1.0
    assert replay(features, prior, np.array([pool[0], pool[1], pool[11]])) == 1.0
    assert replay(features, prior, np.array([pool[0], pool[1], 12])) == 1.0
    assert replay(features, prior, np.array([pool[0], pool[1], -1])) == 1.0
    assert replay(np.zeros((4, 2)), np.zeros(4), np.array([1, 1])) == 1.0  # even where nothing is left to gain


def test_replay_stops_where_the_residual_saturates():
    features = np.zeros((6, 4))
    features[0, 0] = features[1, 1] = 1.0
    features[2, 2] = 1e-3
    assert replay(features, np.zeros(6), np.array([0, 1, 4])) == 0.0
    assert replay(features, np.zeros(6), np.array([0, 1, 4]), epsilon=1e-7) == pytest.approx(1.0)


# ── Degenerate input ─────────────────────────────────────────────────────────


@REPEATABLE
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.sampled_from([1.0, 1.5, 4]))
def test_token_select_is_sound_on_rank_deficient_features(seed: int, tokens: int, keep: int, rank: int, factor: float):
    assume(keep <= tokens)
    rng = np.random.default_rng(seed)
    features = (rng.integers(-2, 3, (tokens, rank)) @ rng.integers(-2, 3, (rank, 5))).astype(np.float32)
    prior = rng.integers(0, 3, tokens).astype(np.float32)
    kept = token_select(torch.from_numpy(features)[None], torch.from_numpy(prior)[None], keep, tokens, factor)
    assert_sound(kept, tokens, keep)


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
    assert_sound(token_select(torch.full((1, 20, 8), math.nan), torch.from_numpy(prior)[None], 1, 2), 20, 10)


def test_token_select_counts_nan_prior_as_zero():
    features, prior = image(2, 20, 8)
    clean = prior.copy()
    prior[4], clean[4] = math.nan, 0.0
    assert select(features, prior, 1, 2).tolist() == select(features, clean, 1, 2).tolist()
    kept = token_select(torch.from_numpy(features)[None], torch.full((1, 20), math.nan), 1, 2)
    assert_sound(kept, 20, 10)
    assert kept[0].tolist() == select(features, np.zeros(20, np.float32), 1, 2).tolist()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_token_select_is_sound_on_infinite_features(value: float):
    features, prior = (torch.from_numpy(array)[None] for array in image(2, 20, 8))
    features[0, int(prior[0].argmax()), 3] = value
    assert_sound(token_select(features, prior, 1, 2), 20, 10)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_token_select_is_sound_on_an_infinite_prior(value: float):
    features, prior = (torch.from_numpy(array)[None] for array in image(2, 20, 8))
    prior[0, 5] = value
    assert_sound(token_select(features, prior, 1, 2), 20, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_token_select_computes_in_fp32_whatever_the_dtype(dtype: torch.dtype):
    features, prior = (torch.from_numpy(array)[None].to(dtype) for array in image(6, 90, 48))
    # squares of 300 overflow fp16
    kept = token_select(300 * features, prior, 1, 2)
    assert_sound(kept, 90, 45)
    torch.testing.assert_close(kept, token_select((300 * features).float(), prior.float(), 1, 2))


def test_token_select_of_a_batch_equals_one_by_one():
    images = [image(seed, 80, 32) for seed in range(3)]
    images += [(np.zeros((80, 32), np.float32), images[0][1]), (np.ones((80, 32), np.float32), images[1][1])]
    features, prior = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*images, strict=True))
    together = token_select(features, prior, 7, 8)
    assert_sound(together, 80, 70)
    for row, one in enumerate(images):
        assert together[row].tolist() == select(*one, 7, 8).tolist()


def test_token_select_leaves_its_inputs_alone():
    features, prior = (torch.from_numpy(array)[None] for array in image(2, 20, 8))
    prior[0, 1] = math.nan
    before = features.clone(), prior.clone()
    token_select(features, prior, 1, 2)
    torch.testing.assert_close((features, prior), before, equal_nan=True, rtol=0, atol=0)


def test_token_select_shape_is_known_without_running():
    with torch.device("meta"):
        kept = token_select(torch.empty(3, 577, 8), torch.empty(3, 577), 1, 9)
    assert (kept.shape, kept.dtype) == ((3, 65), torch.int64)


# ── Merge ────────────────────────────────────────────────────────────────────


def merged_literally(x: np.ndarray, kept: list[int], inertia: float) -> np.ndarray:
    """Algorithm 1, lines 24-33, for one image."""
    sums, counts = {s: inertia * x[s] for s in kept}, dict.fromkeys(kept, inertia)
    for j in range(len(x)):
        if j not in kept:
            cosines = [x[j] @ x[s] / (np.linalg.norm(x[j]) * np.linalg.norm(x[s])) for s in kept]
            nearest = kept[int(np.argmax(cosines))]
            sums[nearest] = sums[nearest] + x[j]
            counts[nearest] += 1
    return np.stack([sums[s] / counts[s] for s in kept])


@pytest.mark.parametrize("inertia", [0.5, 1.0, 8.0])
def test_merge_tokens_equals_a_literal_loop(inertia: float):
    features = np.stack([image(seed, 20, 6)[0] for seed in range(3)])
    kept = [[0, 3, 4, 19], [1, 2, 10, 11], [5, 6, 7, 8]]
    merged = merge_tokens(torch.from_numpy(features), torch.tensor(kept), inertia).numpy()
    for row in range(3):
        expected = merged_literally(features[row].astype(np.float64), kept[row], inertia)
        np.testing.assert_allclose(merged[row], expected, rtol=1e-5, atol=1e-6)


def test_merge_tokens_keeping_all_is_identity():
    features = torch.from_numpy(image(0, 12, 6)[0])[None]
    features[0, 3] = features[0, 2]  # a copy must not be folded into its twin
    torch.testing.assert_close(merge_tokens(features, torch.arange(12)[None], 1.0), features)


def test_merge_tokens_with_huge_inertia_leaves_kept_tokens():
    features = torch.from_numpy(image(0, 12, 6)[0])[None]
    kept = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(merge_tokens(features, kept, 1e7), features[:, kept[0]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merge_tokens(features, kept, 1.0), features[:, kept[0]], atol=0.1)


def test_merge_tokens_matches_direction_and_not_length():
    features = torch.tensor([[[1.0, 0.0], [0.0, 100.0], [4.0, 3.0]]])
    merged = merge_tokens(features, torch.tensor([[0, 1]]), 1.0)
    torch.testing.assert_close(merged, torch.tensor([[[2.5, 1.5], [0.0, 100.0]]]))


def test_merge_tokens_of_zero_features_is_finite():
    assert merge_tokens(torch.zeros(1, 5, 4), torch.tensor([[0, 2]]), 1.0).tolist() == torch.zeros(1, 2, 4).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merge_tokens_keeps_the_dtype(dtype: torch.dtype):
    features = torch.from_numpy(image(0, 12, 6)[0])[None].to(dtype)
    merged = merge_tokens(features, torch.tensor([[1, 5, 9]]), 1.0)
    assert merged.dtype == dtype
    expected = merge_tokens(features.float(), torch.tensor([[1, 5, 9]]), 1.0)
    torch.testing.assert_close(merged.float(), expected, rtol=1e-3, atol=1e-3)
