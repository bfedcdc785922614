"""Intervals of percentiles and ratios: exact cases, and how often they hold on series like those of a busy machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from infoprune_export.measure.statistics import (
    clustered_mean,
    effective_count,
    paired_ratio,
    percentiles,
    quantile_interval,
    relative_width,
)

# ── Percentiles ──────────────────────────────────────────────────────────────


def test_percentiles_of_known_times_are_exact():
    found = percentiles(np.random.default_rng(0).permutation(np.arange(101.0)))
    assert (found["p50"], found["p90"], found["p99"]) == (50.0, 90.0, 99.0)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_an_interval_of_independent_times_is_that_of_the_binomial_distribution(q):
    values = np.random.default_rng(3).permutation(np.arange(1.0, 1001.0))
    count = int(effective_count(values <= np.quantile(values, q)))
    assert count > 800
    found = quantile_interval(values, q)
    scale = 1000 / count
    low, high = binom.ppf(0.025, count, q), binom.ppf(0.975, count, q) + 1
    assert found["low"] == pytest.approx(low * scale, abs=2)
    assert found["high"] == pytest.approx(high * scale, abs=2)


def test_a_percentile_beyond_all_rounds_has_no_upper_end():
    times = np.random.default_rng(4).exponential(size=200)
    intervals = percentiles(times)["intervals"]
    assert intervals["p50"]["high"] is not None
    assert intervals["p99"]["low"] is not None
    assert intervals["p99"]["high"] is None  # .99^200 = 13% of such series lie below it altogether
    assert quantile_interval(times[:5], 0.5) == {"low": None, "high": None}


# ── What rounds are worth ────────────────────────────────────────────────────


def autoregressive(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """A stationary AR(1) series of unit variance."""
    noise = rng.standard_normal(n + 100) * math.sqrt(1 - rho * rho)
    values = np.zeros(n + 100)
    for i in range(1, n + 100):
        values[i] = rho * values[i - 1] + noise[i]
    return values[100:]


def test_independent_rounds_are_worth_themselves_and_repeated_ones_what_was_repeated():
    below = np.random.default_rng(0).standard_normal(4000) <= 0
    assert 3500 <= effective_count(below) <= 4000
    assert 500 <= effective_count(np.repeat(below[:1000], 4)) <= 1100
    assert effective_count(np.resize([True, False], 400)) == 400  # alternation is worth no more than independence


def test_an_autoregressive_series_is_worth_what_theory_says():
    # Signs of an AR(1) series correlate by 2/pi asin(rho^k).
    rho = 0.6
    tau = 1 + 2 * sum(2 / math.pi * math.asin(rho**k) for k in range(1, 60))
    worth = [effective_count(autoregressive(np.random.default_rng(s), 2000, rho) <= 0) for s in range(12)]
    assert np.mean(worth) == pytest.approx(2000 / tau, rel=0.15)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_rounds_are_worth_one_to_all_of_them(below):
    assert 1 <= effective_count(np.array(below)) <= len(below)


# ── Ratios ───────────────────────────────────────────────────────────────────


def test_a_constant_ratio_has_no_spread_under_drift():
    fast = np.linspace(1.0, 50.0, 30)
    found = paired_ratio(2 * fast, fast)
    assert (found["median"], found["low"], found["high"]) == pytest.approx((2.0, 2.0, 2.0))
    assert (found["confidence"], found["observations"]) == (0.95, 7)


def test_rounds_are_paired_and_medians_not_divided():
    slow, fast = np.array([10.0, 1.0, 30.0]), np.array([5.0, 10.0, 10.0])
    assert paired_ratio(slow, fast)["median"] == pytest.approx(2.0)  # the medians' quotient would be 1


def test_whoever_comes_first_is_not_taken_for_a_difference():
    first = np.resize([1.3, 1.0], 40)  # whoever comes first waits for something
    found = paired_ratio(first, np.resize([1.0, 1.3], 40))
    assert (found["low"], found["high"]) == pytest.approx((1.0, 1.0))


def test_too_few_rounds_give_their_range_and_say_what_it_covers():
    found = paired_ratio(np.array([2.0, 3.0, 5.0]), np.ones(3))
    assert (found["low"], found["median"], found["high"]) == pytest.approx((2.0, 3.0, 5.0))
    assert found["confidence"] <= 0.75
    assert relative_width(found) == math.inf
    assert paired_ratio(np.ones(1), np.ones(1))["confidence"] == 0.0


def test_unequal_or_no_rounds_are_refused():
    for slow, fast in ((np.ones(3), np.ones(4)), (np.ones(0), np.ones(0))):
        with pytest.raises(ValueError, match="rounds against"):
            paired_ratio(slow, fast)


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=80),
    st.floats(0.01, 100),
    st.integers(0, 2**32 - 1),
)
def test_a_ratio_scales_and_turns_round(fast, factor, seed):
    fast = np.array(fast)
    slow = fast * np.exp(np.random.default_rng(seed).standard_normal(len(fast)))
    found, scaled, turned = paired_ratio(slow, fast), paired_ratio(slow * factor, fast), paired_ratio(fast, slow)
    assert found["low"] <= found["median"] * (1 + 1e-9)
    assert found["median"] <= found["high"] * (1 + 1e-9)
    assert scaled["median"] == pytest.approx(factor * found["median"])
    assert turned["median"] == pytest.approx(1 / found["median"])


# ── Means of scores ──────────────────────────────────────────────────────────


def test_the_error_of_a_clustered_mean_is_that_of_its_images():
    # Departures from 0.5: 0.5, 0.5 | -0.5, 0.5 | -0.5, -0.5; sums over images 1, 0, -1.
    percent, error = clustered_mean(np.array([1.0, 1, 0, 1, 0, 0]), [2, 2, 2])
    assert percent == 50
    assert error == pytest.approx(100 * math.sqrt(3 / 2 * 2) / 6)


def test_one_image_gives_no_certainty():
    """Departures of a single cluster always sum to zero."""
    values = np.array([1.0, 0, 0, 1, 0, 1, 1])
    assert clustered_mean(values, [7]) == clustered_mean(values, [1] * 7)
    assert clustered_mean(values, [0, 7, 0])[1] > 15
    assert clustered_mean(np.array([1.0]), [1]) == (100.0, 100.0)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=30), st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_questions_of_one_image_that_move_together_count_once(sizes, seed, copies):
    """Every question copied within its image: the mean is known no better."""
    values = np.random.default_rng(seed).random(sum(sizes))
    copied = clustered_mean(np.repeat(values, copies), np.array(sizes) * copies)
    assert copied == pytest.approx(clustered_mean(values, sizes))


# ── On a busy machine ────────────────────────────────────────────────────────


def heavy(rng: np.random.Generator, n: int) -> np.ndarray:
    """Student's t with two degrees of freedom: no variance."""
    return rng.standard_t(2, n)


def bursts(rng: np.random.Generator, n: int) -> np.ndarray:
    """Quiet, but for disturbances that come seldom and stay for five rounds, each hitting one side or the other."""
    values, hit = 0.3 * rng.standard_normal(n), False
    for i in range(n):
        hit = rng.random() < (0.8 if hit else 0.08)
        values[i] += rng.exponential(5) if hit else 0.0
    return values


NOISES = {
    "independent": lambda rng, n: rng.standard_normal(n),
    "AR(1)": lambda rng, n: autoregressive(rng, n, 0.5),
    "heavy tails": heavy,
    "bursts": bursts,
}


def series(rng: np.random.Generator, rounds: int, noise: str, scale: float = 0.03, ratio: float = 1.0):
    """Two sides under common drift (a slope, and slow waves of 10%), each with noise of its own."""
    common = 0.3 * np.linspace(0, 1, rounds) + 0.1 * autoregressive(rng, rounds, 0.95)
    slow, fast = (common + scale * NOISES[noise](rng, rounds) for _ in range(2))
    return np.exp(slow) * ratio, np.exp(fast)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rounds", [120, 240])
def test_the_interval_contains_the_truth_as_often_as_it_says(noise, rounds):
    rng, trials = np.random.default_rng(7), 300
    found = [paired_ratio(*series(rng, rounds, noise)) for _ in range(trials)]
    covered = sum(one["low"] <= 1 <= one["high"] for one in found if one["confidence"] == 0.95)
    counted = sum(one["confidence"] == 0.95 for one in found)
    assert counted > 0.85 * trials
    assert 0.90 <= covered / counted <= 0.995


@pytest.mark.parametrize(("luck", "first"), [(0.008, 0.008), (0.02, 0.0), (0.0, 0.02)])
@pytest.mark.parametrize("rounds", [72, 240])
def test_the_interval_allows_for_the_luck_of_openings(rounds, luck, first):
    """Every four rounds have a ratio of their own; whoever is opened first, by turns, is slower besides."""
    rng, trials = np.random.default_rng(11), 300
    found = []
    for _ in range(trials):
        slow, fast = series(rng, rounds, "AR(1)", scale=0.01)
        favoured = np.array([first, -first] * (rounds // 8)) * np.repeat(rng.choice([-1, 1], rounds // 8), 2)
        found.append(
            paired_ratio(slow * np.exp(np.repeat(luck * rng.standard_normal(rounds // 4) + favoured, 4)), fast)
        )
    counted = [one for one in found if one["confidence"] == 0.95]
    assert len(counted) > 0.85 * trials
    assert 0.90 <= np.mean([one["low"] <= 1 <= one["high"] for one in counted]) <= 0.995


@pytest.mark.parametrize("noise", NOISES)
def test_a_difference_of_3_percent_is_found(noise):
    rng = np.random.default_rng(8)
    found = [paired_ratio(*series(rng, 300, noise, scale=0.03, ratio=1.03)) for _ in range(60)]
    assert np.mean([one["low"] > 1 for one in found]) > 0.8


def test_a_single_round_bootstrap_would_fail_where_this_holds():
    """What the correction for autocorrelation is for: the same intervals with every round worth one, of one series."""
    rng, trials = np.random.default_rng(9), 200
    naive = honest = 0
    for _ in range(trials):
        values = autoregressive(rng, 200, 0.8)
        found = quantile_interval(values, 0.5)
        honest += found["low"] is None or found["low"] <= 0 <= found["high"]
        ordered = np.sort(values)
        naive += ordered[int(binom.ppf(0.025, 200, 0.5)) - 1] <= 0 <= ordered[int(binom.ppf(0.975, 200, 0.5))]
    assert naive / trials < 0.75
    assert honest / trials > 0.85
