"""Marginal information of visual tokens in the order they are chosen (paper B, section 2.1 and appendix C.1).

Two indicators of what the next token brings to those chosen before it: the length of its part outside their span (MFI)
and the growth of their covariance's volume (MGI). The paper prints the gain of log det G, G the Gram of the chosen, as
log(1 + ||r||^2) with r that outside part (equation 1); it is log ||r||^2, which log(1 + ||r||^2) bounds from above and
which is negative for every token whose r is shorter than 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.polynomial import chebyshev
from numpy.typing import NDArray

from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.reference import scaled_pool
from infoprune_export.tokens.select import EPSILON, greedy_pivots, keep_count

Floats = NDArray[np.float64]
Order = Literal["attention", "infoprune", "random"]

_SMALLEST_RATIO = 1e-10


# ── Orders ───────────────────────────────────────────────────────────────────


def orders(
    features: Floats, prior: Floats, temperature: float, spec: TokensSpec, rng: np.random.Generator
) -> dict[Order, list[int]]:
    """All tokens of one image in the three orders that are compared; the first T of each are those it keeps.

    ``attention`` is the paper's Top-k; ``infoprune`` Algorithm 1 with the recipe's settings, and behind its T tokens
    the dropped ones as Top-k would go on; ``random`` the control. features [N, D] are what Algorithm 1 compares; prior
    [N] and temperature come from `tokens.select.weighting`.
    """
    by_prior = np.argsort(-np.nan_to_num(prior, nan=0.0, posinf=0.0, neginf=0.0), kind="stable").tolist()
    count = kept_count(len(features), spec)
    pool, z = scaled_pool(features, prior, count, spec.pool_factor, temperature, spec.exponent)
    pivots = greedy_pivots(torch.from_numpy(z)[None], torch.ones(1, len(z), dtype=torch.bool), count, EPSILON)[0]
    greedy = pool[pivots.numpy()].tolist()
    kept = set(greedy)
    return {
        "attention": by_prior,
        "infoprune": greedy + [token for token in by_prior if token not in kept],
        "random": rng.permutation(len(features)).tolist(),
    }


def kept_count(tokens: int, spec: TokensSpec) -> int:
    """T of an image with N tokens under a recipe."""
    return keep_count(tokens, spec.keep_ratio.numerator, spec.keep_ratio.denominator)


# ── Increments ───────────────────────────────────────────────────────────────


def unit_energy(features: Floats) -> Floats:
    """Features [N, D] scaled to a mean squared length of 1, so that images and models share one scale and epsilon."""
    energy = float(np.square(features).sum(axis=1).mean())
    return features / math.sqrt(energy) if energy > 0 else features


def increments(features: Floats, order: Sequence[int], epsilon: float) -> tuple[Floats, Floats]:
    """MFI and MGI of each token given those before it (equations 2 and 3), float64 [T] and [T].

    MFI is in the unit of the features, MGI in nats. C of no token is 0, so the first MGI is log(1 + ||x||^2 / epsilon).
    MGI is negative where the new token adds less than the others lose by sharing the mean with it: equation 3 taken
    literally. Appendix C.1.2 prints a rank-one formula that leaves out this rescaling; it is not equation 3.

    Args:
        features: float64 [N, D].
        order: T different indices into the features.
        epsilon: of equation 3, in the unit of the squared features.

    Raises:
        ValueError: not a matrix, not finite, an index out of range or repeated, or an epsilon below 1e-10 of the
            largest squared length, which float64 cannot resolve.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"features of shape {list(x.shape)}: expected a finite matrix [tokens, channels]")
    chosen = np.asarray(order, np.int64)
    if len(np.unique(chosen)) != len(chosen) or any(not 0 <= token < len(x) for token in chosen):
        raise ValueError(f"order names a token twice or one outside the {len(x)} there are")
    x = x[chosen]
    smallest = _SMALLEST_RATIO * float(np.square(x).sum(axis=1).max(initial=0.0))
    if not (epsilon > 0 and epsilon >= smallest):
        raise ValueError(f"epsilon = {epsilon}: must be positive and at least {smallest:.3g} for these features")
    return _residual_lengths(x), np.diff(_volumes(x, epsilon), prepend=0.0)


def _residual_lengths(x: Floats) -> Floats:
    """Length of each row's part outside the span of the rows before it, [T], by Gram-Schmidt in O(T^2 D).

    A plain QR would be wrong here: behind a dependent row it goes on with a direction made of rounding errors, and the
    rows after it lose what they have along that direction. Here such a row gives exactly 0 and no direction.
    """
    basis = np.empty((min(x.shape), x.shape[1]))
    lengths, rank = np.zeros(len(x)), 0
    tolerance = 8 * max(x.shape, default=0) * np.finfo(np.float64).eps
    for step, row in enumerate(x):
        if rank == len(basis):
            break
        known, residual = basis[:rank], row
        for _ in range(2):  # what rounding leaves of the span after the first time is gone after the second
            residual = residual - known.T @ (known @ residual)
        length = float(np.linalg.norm(residual))
        if length > tolerance * np.linalg.norm(row):
            lengths[step], basis[rank] = length, residual / length
            rank += 1
    return lengths


def _volumes(x: Floats, epsilon: float) -> Floats:
    """The log det(C_S + epsilon I) - D log epsilon for S = the first 1, 2, ... T rows, [T].

    It equals log det(I + K_t / s) with K_t the leading t x t block of the Gram and s = t epsilon. One Cholesky factor
    gives all leading blocks, but for one s, and s grows with t. The value is analytic in log s up to a distance of pi
    from the real line, so Chebyshev interpolation between 30 to 50 factors is exact to rounding for every t: O(T^3 log
    T) instead of O(T^4).
    """
    count = len(x)
    if not count:
        return np.zeros(0)
    gram, half = x @ x.T, math.log(max(count, 2)) / 2
    convergence = math.asinh(math.pi / half)
    degree = math.ceil(-math.log(np.finfo(np.float64).eps / 16) / convergence)
    nodes = chebyshev.chebpts1(degree + 1)
    factors = (np.linalg.cholesky(np.eye(count) + gram / s) for s in epsilon * np.exp(half * (1 + nodes)))
    values = np.stack([2 * np.log(factor.diagonal()).cumsum() for factor in factors])
    places = np.log(np.arange(1, count + 1)) / half - 1
    coefficients = chebyshev.chebfit(nodes, values, degree)
    return chebyshev.chebval(places, coefficients, tensor=False).astype(np.float64)


# ── Curves ───────────────────────────────────────────────────────────────────


def resample(curve: Floats, points: int) -> Floats:
    """A curve over N tokens at the shares 1/points, 2/points, ... 1 of them: the token that reaches the share."""
    share = np.arange(1, points + 1) * len(curve)
    return curve[-(-share // points) - 1]


def late_advantage(mfi: Floats) -> float:
    """Share of token pairs in which the later one brings more, 0..1.

    0 if every token brings less than those before it, 1/2 if the order says nothing; above is the paper's "late-stage
    advantage". A single token has none.
    """
    first, second = np.triu_indices(len(mfi), 1)
    return float((mfi[second] > mfi[first]).mean()) if len(first) else 0.0
