"""Percentiles and ratios of latencies, with intervals that hold on a machine that others use too; means of scores.

Rounds of a shared machine are not independent: what disturbs one often disturbs the next. Both kinds of interval here
are order statistics, which assume nothing about the distribution (times have long tails), taken as if there were only
so many rounds as are worth independent ones:

1. Whether a time lies below the quantile is a series of zeros and ones. Its integrated autocorrelation time tau (1 for
   independent rounds) says how many rounds are worth one: the variance of a sample quantile of a stationary series is
   tau q (1 - q) / (n f^2), f being the density there.
2. An interval for the quantile q reaches from the r-th smallest of n / tau to the r'-th largest, by the binomial
   distribution; see David and Nagaraja, Order Statistics, 7.1.

A bootstrap of single rounds would call a disturbance that lasts ten rounds ten observations, and says nothing about a
99th percentile that lies beyond all rounds. Here that end of the interval is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from infoprune_export.measure.results import Interval, Percentiles, Ratio

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
NORMAL_95 = 1.959964
"""Standard errors to either side of a 95% interval."""
_PERCENTILES = (50, 90, 99)
BLOCK = 4
"""Rounds over which `latency` gives every alternative the same places. Every second block mirrors the one before."""
_FEWEST = 6
"""With fewer observations, no two order statistics enclose a median with 95%: 1 - 2^(1-n)."""
_LARGEST_CORRELATION = 0.99


def percentiles(times: Floats) -> Percentiles:
    """p50, p90 and p99 of times [rounds] in their order, in the unit of `times`, with 95% intervals."""
    values = {f"p{q}": float(np.percentile(times, q)) for q in _PERCENTILES}
    intervals = {f"p{q}": quantile_interval(times, q / 100) for q in _PERCENTILES}
    return {"p50": values["p50"], "p90": values["p90"], "p99": values["p99"], "intervals": intervals}


def quantile_interval(values: Floats, q: float) -> Interval:
    """The 95% interval of the quantile q, 0 < q < 1, of a stationary series [n] in its order.

    An end is None where n rounds cannot bound it: 367 independent ones are the fewest that bound a 99th percentile.
    """
    count = int(effective_count(values <= np.quantile(values, q)))
    ordered = np.sort(values)
    low = _order_statistic(ordered, count, q)
    high = _order_statistic(-ordered[::-1], count, 1 - q)
    return {"low": low, "high": None if high is None else -high}


def _order_statistic(ordered: Floats, count: int, q: float) -> float | None:
    """Lower end of the interval of the quantile q, as the values' order statistic that `count` values put it at."""
    rank = _rank(count, q)
    if rank == 0:
        return None
    return float(ordered[max(1, rank * len(ordered) // count) - 1])


@lru_cache(maxsize=4096)
def _rank(count: int, q: float) -> int:
    """The largest r with P(Binomial(count, q) < r) <= 2.5%: the r-th smallest exceeds the quantile no more often."""
    below, rank = 0.0, 0
    while rank < count:
        ways = math.lgamma(count + 1) - math.lgamma(rank + 1) - math.lgamma(count - rank + 1)
        below += math.exp(ways + rank * math.log(q) + (count - rank) * math.log1p(-q))
        if below > (1 - CONFIDENCE) / 2:
            break
        rank += 1
    return rank


def effective_count(below: NDArray[np.bool_]) -> float:
    """How many independent rounds a series of n is worth, 1 to n, by whether each lay below the quantile.

    The larger of two estimates of tau: the initial monotone sequence (Geyer, Practical Markov Chain Monte Carlo, 1992,
    3.3), and that of an AR(1) series, whose coefficient is raised by its small-sample bias (1 + 3 rho) / n (Kendall,
    Note on Bias in the Estimation of Autocorrelation, 1954). Never below 1: a lucky negative correlation narrows
    nothing.
    """
    n = len(below)
    centred = below - below.mean()
    variance = float(centred @ centred)
    if n < 4 or variance == 0.0:
        return float(n)
    spectrum = np.fft.rfft(centred, 2 * n)
    correlation = np.fft.irfft(spectrum * spectrum.conj())[:n] / variance
    monotone, last = -1.0, math.inf
    for lag in range(0, n // 2 - 1, 2):
        last = min(last, float(correlation[lag] + correlation[lag + 1]))
        if last <= 0:
            break
        monotone += 2 * last
    first = float(correlation[1]) + (1 + 3 * float(correlation[1])) / n
    first = min(max(first, 0.0), _LARGEST_CORRELATION)
    tau = max(1.0, monotone, (1 + first) / (1 - first))
    return max(1.0, n / tau)


# ── Ratio of two alternatives ────────────────────────────────────────────────


def paired_ratio(slow: Floats, fast: Floats) -> Ratio:
    """Median of the ratios slow / fast of times [rounds] taken in the same rounds, with its 95% interval.

    Two rounds at the same place of a block and of its mirror make one observation, the geometric mean of their ratios,
    so that neither whoever is opened first, nor whoever is called first or follows itself, is taken for a difference.
    Fewer than 48 rounds hold too few openings to tell how their luck varies: then the four rounds of a block make one
    observation, with fewer than 24 every two rounds, with fewer than twelve every round. Where there are too few
    observations, the interval is their whole range and `confidence` says what it covers.

    Raises:
        ValueError: not equally many rounds, or none.
    """
    if len(slow) != len(fast) or not len(slow):
        raise ValueError(f"{len(slow)} rounds against {len(fast)}")
    logs = np.log(slow) - np.log(fast)
    logs = _observations(logs)
    middle = float(np.median(logs))
    worth, interval = effective_count(logs <= middle), quantile_interval(logs, 0.5)
    low, high, confidence = interval["low"], interval["high"], CONFIDENCE
    if low is None or high is None:
        low, high, confidence = float(logs.min()), float(logs.max()), 1 - 2.0 ** (1 - int(worth))
    return {
        "median": math.exp(middle),
        "low": math.exp(low),
        "high": math.exp(high),
        "confidence": confidence,
        "observations": len(logs),
        "effective": worth,
    }


def _observations(logs: Floats) -> Floats:
    """See `paired_ratio`; what is left over of the last one is not used."""
    if len(logs) >= 2 * BLOCK * _FEWEST:
        blocks = logs[: len(logs) // (2 * BLOCK) * 2 * BLOCK].reshape(-1, 2, BLOCK)
        return np.asarray(blocks.mean(1).reshape(-1))
    together = next((rounds for rounds in (BLOCK, 2) if len(logs) >= rounds * _FEWEST), 1)
    return np.asarray(logs[: len(logs) // together * together].reshape(-1, together).mean(1))


def relative_width(ratio: Ratio) -> float:
    """Width of the interval over the ratio; infinite where it covers less than 95%."""
    if ratio["confidence"] < CONFIDENCE:
        return math.inf
    return (ratio["high"] - ratio["low"]) / ratio["median"]


# ── Means of scores ──────────────────────────────────────────────────────────


def clustered_mean(values: Floats, sizes: Sequence[int] | NDArray[np.int64]) -> tuple[float, float]:
    """Mean of per-question scores [questions] (or paired differences of them) and its standard error, in percent.

    Questions of one image are one cluster; `sizes` [images] says how many each has, in the order of the questions. With
    deviations d_i from the mean and G images c: SE = sqrt(G / (G - 1) sum_c (sum_{i in c} d_i)^2) / n (Liang and Zeger,
    Longitudinal data analysis using generalized linear models, 1986). Questions about a single image are taken as
    independent, since nothing says how images differ; a single question says nothing, which is an error of 100.
    """
    if len(values) == 1:
        return 100 * float(values[0]), 100.0
    sizes = [size for size in sizes if size]
    if len(sizes) == 1:
        sizes = [1] * len(values)
    count = len(sizes)
    sums = np.bincount(np.repeat(np.arange(count), sizes), weights=values - values.mean(), minlength=count)
    error = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(values)
    return 100 * float(values.mean()), 100 * error
