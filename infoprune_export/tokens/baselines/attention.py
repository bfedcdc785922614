"""Tokens that the vision tower attends to: FasterVLM and VisionZip."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.baselines.common import attention, budgets, finite, gathered, highest, indices, own
from infoprune_export.tokens.selector import Candidates, Selection

_CONTEXTUAL, _TOTAL = 10, 64
"""VisionZip's contextual tokens: 10 of 64, and as many of 128 and 192."""


def fastervlm(candidates: Candidates, spec: TokensSpec) -> Selection:
    """The T tokens with most attention from [CLS] in the last block, head mean (FasterVLM, arXiv 2412.01818)."""
    chosen = highest(attention(candidates), budgets(candidates, spec))
    return gathered(candidates.tokens, indices(chosen, spec))


def visionzip(candidates: Candidates, spec: TokensSpec) -> Selection:
    """Dominant tokens, and contextual ones that stand for the rest (VisionZip, arXiv 2412.04467).

    Of T tokens floor(10 T / 64) are contextual, as in the paper's 54 + 10; the others have most attention from [CLS].
    Adapted: the paper counts the [CLS] token among the dominant ones and passes it on, and puts contextual tokens
    behind them; keys of a Qwen tower are compared after rotary embedding.
    """
    count = budgets(candidates, spec)
    contextual = count * _CONTEXTUAL // _TOTAL
    dominant = highest(attention(candidates), count - contextual)
    targets, tokens = summarised(candidates.tokens, candidates.keys, own(candidates) & ~dominant, contextual)
    return gathered(tokens, indices(dominant | targets, spec))


def summarised(tokens: Tensor, keys: Tensor, rest: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """`count` targets at a uniform stride among the `rest`; every other of these goes to the target of nearest key.

    x_t' = x_t + mean of its tokens, a sum and not an average, as published.

    Args:
        tokens: [B, N, E], any floating dtype.
        keys: head-mean keys [B, N, head_dim]; cosine compares them.
        rest: what is not dominant, bool [B, N].
        count: int64 [B], at most as many as the rest.

    Returns:
        Targets, bool [B, N], and the tokens [B, N, E] with new values at the targets, in the dtype of `tokens`.
    """
    place = rest.cumsum(1) - 1
    stride = (rest.sum(1) // count.clamp_min(1)).clamp_min(1)[:, None]
    targets = rest & (place % stride == 0) & (place // stride < count[:, None])
    unit = F.normalize(finite(keys).float(), dim=-1)
    nearest = (unit @ unit.transpose(1, 2)).masked_fill(~targets[:, None], -2.0).argmax(-1)
    goes = F.one_hot(nearest, rest.shape[1]).bool() & (rest & ~targets)[..., None]
    share = goes.transpose(1, 2).float()
    x = finite(tokens).float()
    mean = share @ x / share.sum(-1, keepdim=True).clamp_min(1)
    return targets, torch.where(targets[..., None], x + mean, x).to(tokens.dtype)
