"""Tokens that differ from each other: DivPrune and CDPruner. Both are greedy on cosines of the language model's input.

Cosines are fp64: both methods decide between tokens that are nearly the same, where rounding would choose. A token of
length zero has cosine 0 with every other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.baselines.common import budgets, finite, gathered, indices, leading, own
from infoprune_export.tokens.select import EPSILON, greedy_pivots
from infoprune_export.tokens.selector import Candidates, Selection

_DECIMALS = 9
"""Cosine distances are equal up to here; the error of fp64 is six orders smaller."""


def divprune(candidates: Candidates, spec: TokensSpec) -> Selection:
    """Largest least cosine distance between kept tokens, greedily (DivPrune, arXiv 2503.02175)."""
    return _chosen(candidates, spec, farthest_first)


def cdpruner(candidates: Candidates, spec: TokensSpec) -> Selection:
    """MAP of a determinantal point process on cosines, greedily (CDPruner, arXiv 2506.10967), **without relevance**.

    The paper's kernel is r_i cos_ij r_j, with r from the distance of token and question in CLIP's joint space. That
    needs CLIP's text tower, which a vision-language model's checkpoint does not hold; so r is constant here, and this
    is the paper's method without its condition. Adapted besides: where the rank of the kernel is spent (pivots would be
    noise or NaN), what is left is filled from the lowest index on.
    """
    return _chosen(candidates, spec, determinant_order)


def farthest_first(x: Tensor, inside: Tensor, keep: int) -> Tensor:
    """First the token whose nearest other is farthest away, then always the one farthest from all chosen so far.

    x [B, N, D], inside bool [B, N]: which tokens may be chosen; int64 [B, keep] in the order of choice. Behind a row's
    own tokens the order means nothing.
    """
    unit = _unit(x)
    # Rounded, so that ties are ties: copies, and nearest neighbours of each other.
    distance = (1 - unit @ unit.transpose(1, 2)).round(decimals=_DECIMALS)
    rows, itself = torch.arange(len(x), device=x.device), torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    reach = distance.masked_fill(itself | ~inside[:, None], math.inf).amin(-1)
    free, order = inside.clone(), []
    for step in range(keep):
        pick = reach.masked_fill(~free, -math.inf).argmax(1)
        order.append(pick)
        free[rows, pick] = False
        reach = distance[rows, pick] if step == 0 else torch.minimum(reach, distance[rows, pick])
    return torch.stack(order, dim=1)


def determinant_order(x: Tensor, inside: Tensor, keep: int) -> Tensor:
    """Tokens in the order in which each adds most to the determinant of the chosen ones' cosines.

    Shapes as in `farthest_first`. That is pivoted Cholesky of the cosines. All of them are 1 on its diagonal, so the
    first pivot is the lowest index; it is taken by itself, because rounding of the diagonal would choose another.
    """
    unit, rows = _unit(x) * inside[..., None], torch.arange(len(x), device=x.device)
    first = (unit != 0).any(-1).int().argmax(1)
    if keep == 1:
        return first[:, None]
    direction = unit[rows, first][:, None]
    residual = unit - (unit * direction).sum(-1, keepdim=True) * direction
    free = inside.clone()
    free[rows, first] = False
    return torch.cat([first[:, None], greedy_pivots(residual, free, keep - 1, EPSILON)], dim=1)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(finite(x).double(), dim=-1)


def _chosen(candidates: Candidates, spec: TokensSpec, ordered: Callable[[Tensor, Tensor, int], Tensor]) -> Selection:
    """By what the language model gets; of Qwen3-VL's features, by those of its first layer."""
    count, compared = budgets(candidates, spec), candidates.embeddings[..., : candidates.tower.selection_width]
    order = ordered(compared, own(candidates), int(count.max()))
    return gathered(candidates.tokens, indices(leading(order, count, compared.shape[1]), spec))
