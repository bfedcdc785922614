"""Algorithm 1 in NumPy float64: the literal listing, and the judge of anybody else's answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infoprune_export.tokens.select import EPSILON, keep_count, pool_count

Floats = NDArray[np.float64]


def scaled_pool(
    features: NDArray[np.floating],
    prior: NDArray[np.floating],
    keep: int,
    pool_factor: float,
    temperature: float,
    exponent: float,
) -> tuple[NDArray[np.int64], Floats]:
    """Lines 2-4 for one image: pool indices by descending prior [M], and Z = sqrt(q) x for them [M, D]."""
    a = np.nan_to_num(np.asarray(prior, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    scores = np.exp((a - a.max()) / temperature)
    q = (scores / scores.sum()) ** exponent
    pool = np.argsort(-a, kind="stable")[: pool_count(len(a), keep, pool_factor)]
    x = np.nan_to_num(np.asarray(features, np.float64)[pool], nan=0.0, posinf=0.0, neginf=0.0)
    return pool, np.sqrt(q[pool])[:, None] * x


def literal_selection(
    features: NDArray[np.floating],
    prior: NDArray[np.floating],
    numerator: int,
    denominator: int,
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = EPSILON,
) -> list[int]:
    """Kept tokens of one image [N, D] in the order of Algorithm 1, with the explicit basis it is written with."""
    keep = keep_count(len(features), numerator, denominator)
    pool, z = scaled_pool(features, prior, keep, pool_factor, temperature, exponent)
    norms = (z**2).sum(1)
    basis = np.zeros((0, z.shape[1]))
    chosen: list[int] = []
    while len(chosen) < keep:
        residual = norms - ((z @ basis.T) ** 2).sum(1)
        residual[chosen] = -np.inf
        best = int(residual.argmax())
        if residual[best] <= epsilon * norms.max():
            chosen += [i for i in range(len(pool)) if i not in chosen][: keep - len(chosen)]
            break
        chosen.append(best)
        direction = z[best] - basis.T @ (basis @ z[best])
        basis = np.vstack([basis, direction / np.linalg.norm(direction)])
    return [int(pool[i]) for i in chosen]


def replay(
    features: NDArray[np.floating],
    prior: NDArray[np.floating],
    kept: NDArray[np.int64],
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = EPSILON,
) -> float:
    """Worst step of a kept set [T] of one image, in [0, 1]: 1 - (best residual inside the set) / (best residual).

    Index equality is the wrong test across precisions, because near-ties swap tokens of equal worth. Replaying the
    greedy rule in float64, confined to the set, costs nothing where it agrees and shows by how much it ever differs.
    A token outside the pool, or a repeated one, counts as the worst possible step.
    """
    pool, z = scaled_pool(features, prior, len(kept), pool_factor, temperature, exponent)
    place = {int(token): i for i, token in enumerate(pool)}
    if len(set(kept.tolist())) != len(kept) or any(int(token) not in place for token in kept):
        return 1.0
    remaining = sorted(place[int(token)] for token in kept)
    residual = (z**2).sum(1)
    floor = epsilon * residual.max()
    vectors = z.copy()
    free = np.ones(len(pool), bool)
    worst = 0.0
    while remaining:
        best = float(residual[free].max())
        if best <= floor:
            break
        inside = max(remaining, key=lambda i: residual[i])
        worst = max(worst, 1 - residual[inside] / best)
        remaining.remove(inside)
        free[inside] = False
        norm = np.linalg.norm(vectors[inside])
        if norm > 0:
            direction = vectors[inside] / norm
            vectors = vectors - np.outer(vectors @ direction, direction)
            residual = np.maximum((vectors**2).sum(1), 0)
    return worst
