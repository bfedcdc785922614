"""The judges themselves: the literal listing, the pool, the replay of anybody's choice; and the fast form in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
from selections import KINDS, image, padded, vectors

from infoprune_export.tokens import reference
from infoprune_export.tokens.reference import greedy_pivots, literal_selection, replay, scaled_pool, token_select

# ── The listing ──────────────────────────────────────────────────────────────


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


# ── The fast form ────────────────────────────────────────────────────────────
# Its answers beside those of the other two implementations are in export/test_operators.py.


@pytest.mark.parametrize("kind", KINDS)
def test_fast_pivots_in_float64_are_the_literal_sequence(kind: str):
    """Up to three blocks, and pivots whose rows were not made in advance."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        size, width = int(rng.integers(2, 400)), int(rng.integers(2, 150))
        z = vectors(kind, rng, size, width)
        keep = int(rng.integers(1, np.linalg.matrix_rank(z) + 1))
        expected = literal_selection(z, np.zeros(size), keep, size, size, epsilon=1e-12)
        assert greedy_pivots(z, keep, 1e-12).tolist() == expected


@pytest.mark.parametrize(("block", "likely"), [(1, 1), (3, 5), (7, 200)])
def test_fast_pivots_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch, block: int, likely: int):
    z = vectors("clustered", np.random.default_rng(1), 90, 40)
    expected = greedy_pivots(z, 60, 1e-9)
    monkeypatch.setattr(reference, "_BLOCK", block)
    monkeypatch.setattr(reference, "_LIKELY", likely)
    assert greedy_pivots(z, 60, 1e-9).tolist() == expected.tolist()


def test_fast_pivots_behind_the_rank_are_in_the_order_of_the_prior():
    z = np.zeros((8, 4))
    z[5, 0], z[2, 1] = 2.0, 1.0
    assert greedy_pivots(z, 6, 1e-5).tolist() == [5, 2, 0, 1, 3, 4]
    z[5, 0] = 1000.0  # the other one is saturated now
    assert greedy_pivots(z, 3, 1e-5).tolist() == [5, 0, 1]


def test_fast_pivots_are_different_tokens_even_without_a_threshold():
    z = vectors("low rank", np.random.default_rng(0), 40, 30)
    pivots = greedy_pivots(z, 40, 0.0)
    assert sorted(pivots.tolist()) == list(range(40))
    # No more are chosen than there are dimensions; the others come by place.
    few = greedy_pivots(z[:, :6], 20, 0.0).tolist()
    assert few[6:] == [i for i in range(40) if i not in few[:6]][:14]


def test_fast_selection_leaves_its_inputs_alone_and_computes_in_fp32():
    features, prior, counts = padded([image(0, 30, 8), image(1, 12, 8)])
    before = features.copy(), prior.copy(), counts.copy()
    kept = token_select(features, prior, counts, 1, 2)
    for value, old in zip((features, prior, counts), before, strict=True):
        np.testing.assert_array_equal(value, old)
    wide = token_select(features.astype(np.float64), prior.astype(np.float64), counts, 1, 2)
    assert kept.tolist() == wide.tolist()
    pool, z = scaled_pool(features[0], prior[0], 4, 2.0, 0.7, 0.5, np.float32)
    assert (pool.dtype, z.dtype) == (np.int64, np.float32)
    # Equal in fp32, so the lower place is taken although the other is larger in float64.
    close = np.array([[[1.0, 0.0], [1.0 + 1e-12, 0.0]]])
    assert token_select(close, np.zeros((1, 2)), np.array([2]), 1, 2).tolist() == [[0]]
