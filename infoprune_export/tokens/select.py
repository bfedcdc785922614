"""Stage 1 visual-token selection and merge (paper B, section 3.1, Algorithm 1), in PyTorch.

Algorithm 1's greedy choice of the largest residual is column-pivoted QR of Z^T, which is pivoted Cholesky of the Gram
Z Z^T: the same sequence in exact arithmetic, at O(M d T) instead of O(M d T^2), see `greedy_pivots`. All of it is fp32
whatever the model's dtype. Decisions the paper leaves open:

- the pool is ranked on the prior a, not on q = softmax(a / tau)^gamma_q: the order is the same, but q has far fewer
  distinct values in low precision;
- by default a is the logarithm of an attention, which makes q a power of it (see `weighting`);
- saturation is relative, 1e-5 of the largest squared norm in the pool: an absolute threshold is either below fp32 noise
  or above real signal. What the greedy step leaves open is filled in the order of the prior;
- ties go to the lowest position in the pool; kept indices are ascending; what is not finite counts as zero; the answer
  has always T tokens. Z is scaled to largest entry 1, which changes no choice and keeps the Gram from overflowing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from infoprune_export.models.boundaries import CHOSEN, mark
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.selector import Candidates, Selection

EPSILON = 1e-5
BLOCK, LIKELY = 64, 96
"""Pivots between two eliminations of z, and how many tokens' rows of the Gram matrix are made at once for them."""


def keep_count(tokens: int, numerator: int, denominator: int) -> int:
    """T = ceil(N * numerator / denominator), in integers so that every runtime agrees."""
    return (tokens * numerator + denominator - 1) // denominator


def pool_count(tokens: int, keep: int, pool_factor: float) -> int:
    """M = min(N, ceil(alpha T)); the product is rounded to fp32, as it is inside an ONNX graph."""
    return min(tokens, math.ceil(np.float32(pool_factor) * np.float32(keep)))


@torch.library.custom_op("infoprune::token_select", mutates_args=())
def token_select(
    features: Tensor,
    prior: Tensor,
    counts: Tensor,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = EPSILON,
) -> Tensor:
    """Ascending indices of the kept tokens, int64 [B, T], with T = ceil(N * numerator / denominator).

    An image of n < N tokens keeps ceil(n * numerator / denominator) of them, and -1 fills its row.

    Args:
        features: [B, N, D], any floating dtype.
        prior: attention each token receives [B, N], any floating dtype; higher is more important.
        counts: how many leading tokens of each row belong to the image, int64 [B], 0..N; the rest is never looked at.
        keep_numerator: with `keep_denominator`, the share that is kept.
        keep_denominator: see `keep_numerator`.
        pool_factor: alpha; the pool holds the min(n, ceil(alpha T)) tokens of highest prior.
        temperature: tau in q = softmax(a / tau)^gamma_q.
        exponent: gamma_q.
        epsilon: greedy stops at a residual of this fraction of the largest squared norm.
    """
    settings = keep_numerator, keep_denominator, pool_factor, temperature, exponent, epsilon
    if features.is_cuda:
        from infoprune_export.tokens import cuda, kernel

        if (kept := cuda.token_select(features, prior, counts, kernel.Settings(*settings))) is not None:
            return kept
    return select_by_pytorch(features, prior, counts, *settings)


def select_by_pytorch(
    features: Tensor,
    prior: Tensor,
    counts: Tensor,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float,
    temperature: float,
    exponent: float,
    epsilon: float,
) -> Tensor:
    """`token_select` in PyTorch's own operators, which every device has."""
    size = features.shape[1]
    keep = keep_count(size, keep_numerator, keep_denominator)
    keeps = (counts * keep_numerator + (keep_denominator - 1)) // keep_denominator
    own = torch.arange(size, device=prior.device) < counts[:, None]
    a = torch.where(own, _finite(prior), -math.inf)
    q = torch.softmax(a / temperature, dim=-1) ** exponent
    pool = a.argsort(dim=1, descending=True, stable=True)[:, : pool_count(size, keep, pool_factor)]
    pooled = torch.minimum(counts, (keeps.float() * pool_factor).ceil().long())
    inside = torch.arange(pool.shape[1], device=prior.device) < pooled[:, None]
    z = _finite(features.gather(1, pool[..., None].expand(-1, -1, features.shape[2])))
    z = torch.where(inside, q.gather(1, pool).to(z).sqrt(), 0.0)[..., None] * z
    z = z / z.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    kept = pool.gather(1, greedy_pivots(z, inside, keep, epsilon))
    kept = torch.where(torch.arange(keep, device=kept.device) < keeps[:, None], kept, size).sort(dim=1).values
    return torch.where(kept == size, -1, kept)


@token_select.register_fake
def _(
    features: Tensor,
    prior: Tensor,
    counts: Tensor,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = EPSILON,
) -> Tensor:
    keep = keep_count(features.shape[1], keep_numerator, keep_denominator)
    return features.new_empty((features.shape[0], keep), dtype=torch.int64)


def _finite(x: Tensor) -> Tensor:
    """fp32 (fp64 stays), with zero for NaN and infinity."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0)


def greedy_pivots(z: Tensor, inside: Tensor, keep: int, epsilon: float) -> Tensor:
    """The first `keep` pivots of Cholesky on z z^T in their order, int64 [B, keep].

    z [B, M, D] is sorted by prior; of each image's rows only those `inside` (bool [B, M]) can be pivots. Where there
    are fewer of them than `keep`, what follows them means nothing.

    A pivot needs its row of the Gram matrix. The rows of the 96 tokens with the largest residuals are one matrix
    product for the next 64 pivots; another pivot's row is computed when it comes. Each row is followed by the token
    itself, which the same elimination turns into an orthonormal direction; behind a block, z loses these. So no M x M
    matrix is ever held, and there are no more pivots than D. Once the largest residual is at most the threshold it
    stays there; what is left open is filled by position.
    """
    batch, size, width = z.shape
    images = torch.arange(batch, device=z.device)
    free = z.square().sum(-1)
    threshold = epsilon * free.amax(1)
    free = free.masked_fill(~inside, -math.inf)
    order = torch.arange(0, -size, -1, device=z.device).repeat(batch, 1).masked_fill(~inside, -size)
    steps = min(keep, width)
    for start in range(0, steps, BLOCK):
        if not bool((free.amax(1) > threshold).any()):
            break
        likely = free.topk(min(size, LIKELY), dim=1).indices
        vectors = z.gather(1, likely[..., None].expand(-1, -1, width))
        rows = torch.cat((vectors @ z.mT, vectors), dim=2)
        numbers = torch.arange(likely.shape[1], device=z.device).expand_as(likely)
        row_number = torch.full_like(order, -1).scatter(1, likely, numbers)
        factor = z.new_zeros(batch, min(BLOCK, steps - start), size + width)
        pivots, bests = [], []
        for j in range(factor.shape[1]):
            best, pivot = free.max(1)
            number = row_number[images, pivot]
            # On a GPU, asking which rows are there costs more than computing all.
            if z.is_cpu and int(number.min()) >= 0:
                row = rows[images, number]
            else:
                vector = z[images, pivot][:, None]
                row = torch.cat((vector @ z.mT, vector), dim=2)[:, 0]
            known = factor[images, :j, pivot][:, None]
            scale = best.sqrt().masked_fill_(best <= threshold, math.inf)[:, None]
            column = torch.baddbmm(row[:, None], known, factor[:, :j], alpha=-1)[:, 0] / scale
            factor[:, j] = column
            free = free.addcmul(column[:, :size], column[:, :size], value=-1)
            free[images, pivot] = torch.where(best > threshold, -math.inf, best)
            pivots.append(pivot)
            bests.append(best)
        chosen = torch.stack(bests, 1) > threshold[:, None]
        ranks = torch.where(chosen, keep - start - torch.arange(len(pivots), device=z.device), -size)
        order = order.scatter_reduce(1, torch.stack(pivots, 1), ranks, "amax")
        if start + BLOCK < steps:
            z = torch.baddbmm(z, factor[..., :size].mT, factor[..., size:], alpha=-1)
    return order.topk(keep, dim=1).indices


def merge_tokens(features: Tensor, kept: Tensor, counts: Tensor, inertia: float, above: float = -1.0) -> Tensor:
    """Kept tokens with every dropped token folded into its most cosine-similar one (Algorithm 1, lines 24-33).

    x_s' = (beta x_s + sum of its dropped tokens) / (beta + their number); a dropped token whose similarity is less than
    `above` is lost. features [B, N, D], kept [B, T] ascending and filled with -1, counts [B] as in `token_select`;
    returns [B, T, D] in the dtype of `features`. Built from operators that every runtime has: the assignment is a 0/1
    matrix, so the sums are one matrix product.
    """
    x = features.float()
    anchors = x.gather(1, kept.clamp_min(0)[..., None].expand(-1, -1, x.shape[2]))
    unit, unit_anchors = F.normalize(x, dim=-1), F.normalize(anchors, dim=-1)
    missing = torch.where(kept < 0, -2.0, 0.0)[:, None, :]
    similarity, nearest = (unit @ unit_anchors.transpose(1, 2) + missing).max(dim=-1)
    positions = torch.arange(x.shape[1], device=x.device)
    dropped = (kept[:, :, None] != positions).all(1) & (positions < counts[:, None]) & (similarity >= above)
    slots = torch.arange(kept.shape[1], device=x.device)
    assignment = ((nearest[:, None, :] == slots[:, None]) & dropped[:, None, :]).float()
    merged = (inertia * anchors + assignment @ x) / (inertia + assignment.sum(-1, keepdim=True))
    return merged.to(features.dtype)


def weighting(prior: Tensor, spec: TokensSpec) -> tuple[Tensor, float]:
    """The prior and temperature with which softmax(a / tau)^gamma_q is the recipe's quality, up to a constant factor.

    A power of the prior is the softmax of its logarithm.
    """
    if spec.quality == "softmax":
        return prior, spec.temperature
    return torch.nan_to_num(prior.float(), nan=0.0, posinf=0.0).clamp_min(torch.finfo(torch.float32).tiny).log(), 1.0


def select_and_merge(candidates: Candidates, spec: TokensSpec) -> Selection:
    """Stage 1 with a recipe's settings."""
    compared = candidates.compared
    prior, temperature = weighting(candidates.prior(spec.prior), spec)
    kept = token_select(
        F.normalize(compared.float(), dim=-1) if spec.normalize else compared,
        prior,
        candidates.counts,
        spec.keep_ratio.numerator,
        spec.keep_ratio.denominator,
        spec.pool_factor,
        temperature,
        spec.exponent,
    )
    return consolidate(candidates, spec, mark(kept, CHOSEN))


def consolidate(candidates: Candidates, spec: TokensSpec, kept: Tensor) -> Selection:
    """The tokens that stand for a choice: with what was dropped merged in, or as they are."""
    tokens = candidates.tokens
    if spec.merge:
        return Selection(merge_tokens(tokens, kept, candidates.counts, spec.inertia, spec.merge_above), kept)
    return Selection(tokens.gather(1, kept.clamp_min(0)[..., None].expand(-1, -1, tokens.shape[2])), kept)
