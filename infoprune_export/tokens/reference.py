"""Stage 1 selection in NumPy: Algorithm 1 as it is printed, the judge of anybody else's answer, and a fast form.

The first two are float64 and plain on purpose. The fast form is fp32 and shares no code with the PyTorch operator and
the ONNX function body, whose answers and speed it is held against.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infoprune_export.tokens.select import EPSILON, keep_count, pool_count

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def scaled_pool(
    features: NDArray[np.floating],
    prior: NDArray[np.floating],
    keep: int,
    pool_factor: float,
    temperature: float,
    exponent: float,
    dtype: type[np.floating] = np.float64,
) -> tuple[Indices, NDArray[np.floating]]:
    """Lines 2-4 for one image: pool indices by descending prior [M], and Z = sqrt(q) x for them [M, D] in `dtype`."""
    a = np.nan_to_num(np.asarray(prior, dtype), nan=0.0, posinf=0.0, neginf=0.0)
    scores = np.exp((a - a.max()) / temperature)
    q = (scores / scores.sum()) ** exponent
    pool = np.argsort(-a, kind="stable")[: pool_count(len(a), keep, pool_factor)]
    z = np.nan_to_num(features[pool].astype(dtype, copy=False), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    z *= np.sqrt(q[pool])[:, None]
    return pool, z


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


# ── Fast ─────────────────────────────────────────────────────────────────────

_BLOCK, _LIKELY = 64, 96


def token_select(
    features: NDArray[np.floating],
    prior: NDArray[np.floating],
    counts: Indices,
    numerator: int,
    denominator: int,
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = EPSILON,
) -> Indices:
    """What `select.token_select` computes, in fp32: ascending kept tokens of each image, int64 [B, T], filled with -1.

    features [B, N, D], prior [B, N], and how many leading tokens are each image's own, counts int64 [B].
    """
    kept = np.full((len(features), keep_count(features.shape[1], numerator, denominator)), -1, np.int64)
    for image, count in enumerate(counts.tolist()):
        if keep := keep_count(count, numerator, denominator):
            own = features[image, :count], prior[image, :count]
            pool, z = scaled_pool(*own, keep, pool_factor, temperature, exponent, np.float32)
            z /= max(z.max(), -z.min(), np.finfo(np.float32).tiny)
            kept[image, :keep] = np.sort(pool[greedy_pivots(z, keep, epsilon)])
    return kept


def greedy_pivots(z: NDArray[np.floating], keep: int, epsilon: float) -> Indices:
    """The first `keep` pivots of Cholesky on z z^T in their order, for one image; z [M, D] is sorted by prior.

    A pivot needs its row of the Gram matrix. The rows of the 96 tokens with the largest residuals are one matrix
    product for the next 64 pivots; another pivot's row is computed when it comes. Each row is followed by the token
    itself, which the same elimination turns into an orthonormal direction; behind a block, z loses these. So no M x M
    matrix is ever held, and there are no more pivots than D. What they leave open is filled in the order of the prior.
    """
    size, width = z.shape
    free = np.einsum("md,md->m", z, z)
    threshold = epsilon * free.max()
    steps, likely_size = min(keep, width), min(size, _LIKELY)
    chosen: list[int] = []
    while len(chosen) < steps and free.max() > threshold:
        likely = np.argpartition(-free, likely_size - 1)[:likely_size]
        rows = np.hstack((z[likely] @ z.T, z[likely]))
        row_of = dict(zip(likely.tolist(), rows, strict=True))
        factor = np.zeros((min(_BLOCK, steps - len(chosen)), size + width), z.dtype)
        for j in range(len(factor)):
            pivot = int(free.argmax())
            if free[pivot] <= threshold:
                break
            row = row_of[pivot] if pivot in row_of else np.hstack((z @ z[pivot], z[pivot]))
            factor[j] = (row - factor[:j, pivot] @ factor[:j]) / np.sqrt(free[pivot])
            free -= factor[j, :size] ** 2
            free[pivot] = -np.inf
            chosen.append(pivot)
        if len(chosen) < steps:
            z = z - factor[:, :size].T @ factor[:, size:]
    rest = np.setdiff1d(np.arange(size), chosen)[: keep - len(chosen)]
    return np.concatenate((np.array(chosen, np.int64), rest))
