"""Marginal increments against their definitions, on random, dependent, repeated and zero tokens; orders and curves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.analysis.information import (
    increments,
    kept_count,
    late_advantage,
    orders,
    resample,
    unit_energy,
)
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.reference import literal_selection

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[np.ndarray, list[int], float]:
    """Features [N, D] of any rank, with repeated, scaled and zero rows; an order of 1..N of them; an epsilon."""
    tokens, width = draw(st.integers(1, 14)), draw(st.integers(1, 9))
    rank = draw(st.integers(0, width))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    features = rng.normal(size=(tokens, rank)) @ rng.normal(size=(rank, width))
    for row in range(tokens):
        kind = draw(st.sampled_from(["as it is", "zero", "copy", "scaled"]))
        if kind == "zero":
            features[row] = 0
        elif kind == "copy":
            features[row] = features[draw(st.integers(0, tokens - 1))]
        elif kind == "scaled":
            features[row] *= 10.0 ** draw(st.integers(-4, 4))
    order = rng.permutation(tokens)[: draw(st.integers(1, tokens))].tolist()
    largest = np.square(features).sum(1).max()
    return features, order, max(10.0 ** draw(st.integers(-3, 2)), 1e-6 * largest)


def literal_mfi(features: np.ndarray, order: list[int]) -> list[float]:
    """Equation 2, the basis from an SVD of all tokens before; made equally long, so that their rank is plain."""
    lengths = []
    for step, token in enumerate(order):
        before = features[order[:step]]
        norms = np.linalg.norm(before, axis=1, keepdims=True)
        before = before / np.where(norms > 0, norms, 1)
        _, sigma, rows = np.linalg.svd(before, full_matrices=False)
        basis = rows[sigma > 1e-9].T
        x = features[token]
        lengths.append(float(np.linalg.norm(x - basis @ (basis.T @ x))))
    return lengths


def literal_mgi(features: np.ndarray, order: list[int], epsilon: float) -> list[float]:
    """Equation 3 with a determinant for every set; C of no token is 0."""
    width = features.shape[1]
    values = [width * np.log(epsilon)]
    for size in range(1, len(order) + 1):
        x = features[order[:size]]
        values.append(np.linalg.slogdet(x.T @ x / size + epsilon * np.eye(width)).logabsdet)
    return np.diff(values).tolist()


# ── Against the definitions ──────────────────────────────────────────────────


@REPEATABLE
@given(sequences())
def test_mfi_equals_projection_on_an_orthonormal_basis(case):
    features, order, epsilon = case
    mfi, _ = increments(features, order, epsilon)
    scale = np.linalg.norm(features[order], axis=1)
    assert mfi.dtype == np.float64
    assert (np.abs(mfi - literal_mfi(features, order)) <= 1e-8 * scale).all()


@REPEATABLE
@given(sequences())
def test_mgi_equals_determinants_of_every_set(case):
    features, order, epsilon = case
    _, mgi = increments(features, order, epsilon)
    np.testing.assert_allclose(mgi, literal_mgi(features, order, epsilon), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (1, 7), (2, 3), (90, 130), (200, 40), (300, 300)])
def test_mgi_of_many_tokens_equals_determinants_of_every_set(tokens, width):
    features = np.random.default_rng(3).normal(size=(tokens, width)) / np.sqrt(width)
    order = np.random.default_rng(4).permutation(tokens).tolist()
    _, mgi = increments(features, order, 1e-3)
    np.testing.assert_allclose(mgi, literal_mgi(features, order, 1e-3), atol=1e-9, rtol=0)


def test_gain_of_log_det_gram_is_twice_log_mfi():
    """The paper prints log(1 + ||r||^2), which is another number."""
    features = np.random.default_rng(0).normal(size=(6, 10))
    mfi, _ = increments(features, range(6), 1.0)
    volumes = [np.linalg.slogdet(features[:t] @ features[:t].T).logabsdet for t in range(1, 7)]
    np.testing.assert_allclose(np.diff(volumes), 2 * np.log(mfi[1:]), atol=1e-12)
    assert (np.abs(np.diff(volumes) - np.log(1 + mfi[1:] ** 2)) > 1e-3).all()


# ── Closed cases ─────────────────────────────────────────────────────────────


def test_rows_behind_a_dependent_one_keep_all_they_add():
    """A QR that goes on with a direction of rounding errors gives the last row less than 1."""
    x = np.random.default_rng(1).normal(size=(3, 50))
    q = np.linalg.qr(x.T)[0].T
    features = np.stack([q[0], q[1], 0.3 * q[0] - 0.7 * q[1], q[0], q[2]])
    mfi, _ = increments(features, range(5), 1.0)
    np.testing.assert_allclose(mfi, [1, 1, 0, 0, 1], atol=1e-14)
    assert mfi[2] == mfi[3] == 0


def test_tokens_beyond_the_width_add_no_direction():
    mfi, _ = increments(np.random.default_rng(2).normal(size=(40, 6)), range(40), 1.0)
    assert (mfi[:6] > 0).all()
    assert (mfi[6:] == 0).all()


def test_basis_stays_orthogonal_where_one_round_of_gram_schmidt_loses_it():
    # Läuchli's rows: one round takes two directions 60 degrees apart for orthogonal, and gives the last sqrt(2).
    mfi, _ = increments(np.hstack([np.ones((3, 1)), 1e-8 * np.eye(3)]), range(3), 1.0)
    np.testing.assert_allclose(mfi[1:] / 1e-8, np.sqrt([2, 1.5]), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_mfi_scales_with_the_features(scale):
    x = np.random.default_rng(6).normal(size=(4, 30))
    features = np.vstack([x, x.sum(0), 3 * x[0]])
    expected, _ = increments(features, range(6), 1.0)
    mfi, _ = increments(scale * features, range(6), scale**2)
    np.testing.assert_allclose(mfi, scale * expected, rtol=1e-12)
    assert (mfi > 0).tolist() == [True] * 4 + [False] * 2


def test_first_token_has_its_length_and_log_of_one_plus_energy_over_epsilon():
    mfi, mgi = increments(np.array([[3.0, 4.0]]), [0], 0.5)
    assert mfi.tolist() == pytest.approx([5.0])
    assert mgi.tolist() == pytest.approx([np.log(1 + 25 / 0.5)], rel=1e-14)


def test_second_orthogonal_and_second_equal_token_have_known_gains():
    _, orthogonal = increments(np.eye(2), [0, 1], 0.25)
    assert orthogonal[1] == pytest.approx(2 * np.log(0.75) - np.log(1.25 * 0.25))
    _, equal = increments(np.array([[1.0, 0], [1, 0]]), [0, 1], 0.25)
    assert equal[1] == pytest.approx(0, abs=1e-12)  # the mean of two equal tokens is the mean of one


def test_redundant_token_costs_what_the_others_lose_in_the_mean():
    # diag(1/2, 1/2) becomes diag(2/3, 1/3).
    _, mgi = increments(np.array([[1.0, 0], [0, 1], [1, 0]]), range(3), 1e-3)
    assert mgi[2] == pytest.approx(np.log((2 / 3 + 1e-3) * (1 / 3 + 1e-3) / (1 / 2 + 1e-3) ** 2))
    assert mgi[2] < 0


def test_order_decides_which_token_comes_when():
    features = np.array([[0.0, 2.0], [1.0, 0.0], [9.0, 9.0]])
    assert increments(features, [1, 0], 1.0)[0].tolist() == [1, 2]
    assert increments(features, [2, 1], 1.0)[0].tolist() == pytest.approx([np.sqrt(162), np.sqrt(0.5)])


def test_zero_tokens_add_nothing():
    mfi, mgi = increments(np.zeros((4, 3)), [2, 0], 1e-6)
    assert mfi.tolist() == mgi.tolist() == [0, 0]


def test_empty_order_gives_empty_curves():
    mfi, mgi = increments(np.ones((3, 2)), [], 1.0)
    assert len(mfi) == len(mgi) == 0


# ── Bad input ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("features", "order", "epsilon", "named"),
    [
        (np.ones(3), [0], 1.0, "matrix"),
        (np.array([[1.0, np.nan]]), [0], 1.0, "finite"),
        (np.ones((3, 2)), [0, 0], 1.0, "twice"),
        (np.ones((3, 2)), [0, 3], 1.0, "outside the 3"),
        (np.ones((3, 2)), [-1], 1.0, "outside the 3"),
        (np.ones((3, 2)), [0], 0.0, "epsilon"),
        (np.ones((3, 2)), [0], float("nan"), "epsilon"),
        (1e6 * np.ones((3, 2)), [0], 1.0, "at least 200"),
    ],
)
def test_increments_refuse_what_has_no_answer(features, order, epsilon, named):
    with pytest.raises(ValueError, match=named):
        increments(features, order, epsilon)


# ── Orders ───────────────────────────────────────────────────────────────────


def image(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(20, 12)), rng.uniform(size=20)


def test_orders_are_permutations_and_begin_with_what_each_would_keep():
    features, prior = image()
    spec = TokensSpec(keep_ratio="2/5", pool_factor=1.5, exponent=2.0)
    named = orders(features, prior, 0.3, spec, np.random.default_rng(7))
    assert set(named) == {"attention", "infoprune", "random"}
    for order in named.values():
        assert sorted(order) == list(range(20))
    assert named["attention"] == sorted(range(20), key=lambda token: -prior[token])
    kept = kept_count(20, spec)
    assert kept == 8
    assert named["infoprune"][:kept] == literal_selection(features, prior, 2, 5, 1.5, 0.3, 2.0)
    behind = named["infoprune"][kept:]
    assert behind == [token for token in named["attention"] if token in behind]
    assert named["random"] == orders(features, prior, 0.3, spec, np.random.default_rng(7))["random"]
    assert named["random"] != orders(features, prior, 0.3, spec, np.random.default_rng(8))["random"]


def test_orders_draw_algorithm_1_from_the_recipes_pool():
    features, prior = image()
    narrow, wide = (
        orders(features, prior, 0.7, TokensSpec(keep_ratio="2/5", pool_factor=factor), np.random.default_rng(0))
        for factor in (1.0, 2.5)
    )
    assert set(narrow["infoprune"][:8]) == set(narrow["attention"][:8]) != set(wide["infoprune"][:8])


def test_orders_tolerate_a_prior_that_is_not_finite():
    features, prior = image()
    prior[[3, 4]] = np.nan, np.inf
    named = orders(features, prior, 0.7, TokensSpec(), np.random.default_rng(0))
    assert named["attention"][-2:] == [3, 4]


def test_greedy_order_of_equal_priors_falls_and_beats_attention_at_every_size():
    features, _ = image(3)
    named = orders(features, np.ones(20), 0.7, TokensSpec(keep_ratio=1.0), np.random.default_rng(0))
    greedy, _ = increments(features, named["infoprune"], 1.0)
    attention, _ = increments(features, named["attention"], 1.0)
    assert (np.diff(greedy) <= 1e-12).all()
    assert np.log(greedy[:12]).sum() > np.log(attention[:12]).sum()
    assert late_advantage(greedy) == 0 < late_advantage(attention)


# ── Curves ───────────────────────────────────────────────────────────────────


def test_unit_energy_scales_the_mean_squared_length_to_one():
    scaled = unit_energy(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(scaled, np.array([[3.0, 4.0], [0.0, 0.0]]) / np.sqrt(12.5))
    assert (unit_energy(np.zeros((2, 2))) == 0).all()


def test_resample_takes_the_token_that_reaches_each_share():
    curve = np.arange(1.0, 7)
    assert resample(curve, 6).tolist() == curve.tolist()
    assert resample(curve, 3).tolist() == [2, 4, 6]
    assert resample(curve, 4).tolist() == [2, 3, 5, 6]  # 1.5, 3, 4.5 and 6 tokens
    assert resample(curve, 12).tolist() == np.repeat(curve, 2).tolist()
    assert resample(np.array([5.0]), 3).tolist() == [5, 5, 5]


def test_late_advantage_counts_pairs():
    assert late_advantage(np.array([3.0, 2.0, 1.0])) == 0
    assert late_advantage(np.array([1.0, 2.0, 3.0])) == 1
    assert late_advantage(np.array([2.0, 1.0, 3.0])) == pytest.approx(2 / 3)
    assert late_advantage(np.array([1.0, 1.0])) == 0
    assert late_advantage(np.array([1.0])) == 0
