"""What all baselines need: whose tokens are whose, attention to rank by, and a choice as a `Selection`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from infoprune_export.models.tower import Prior
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.select import keep_count
from infoprune_export.tokens.selector import Candidates, Selection


def finite(x: Tensor) -> Tensor:
    """The same in the same dtype, with zero for what is not finite."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def own(candidates: Candidates) -> Tensor:
    """Which tokens are an image's and no padding, bool [B, N]."""
    counts = candidates.counts
    return torch.arange(candidates.tokens.shape[1], device=counts.device) < counts[:, None]


def budgets(candidates: Candidates, spec: TokensSpec) -> Tensor:
    """T of each image, int64 [B]; see `keep_count`."""
    ratio = spec.keep_ratio
    return (candidates.counts * ratio.numerator + (ratio.denominator - 1)) // ratio.denominator


def attention(candidates: Candidates, block: int = -1) -> Tensor:
    """The [CLS] row of a block's attention, or without [CLS] what each token receives; fp32 [B, N], padding -inf."""
    kind: Prior = "cls" if "cls" in candidates.tower.priors else "received"
    return finite(candidates.prior(kind, block)).masked_fill(~own(candidates), -math.inf)


def leading(order: Tensor, count: Tensor, size: int) -> Tensor:
    """Which of `size` tokens are among the first `count` (int64 [B]) of each row of `order` [B, M], bool [B, size]."""
    counted = torch.arange(order.shape[1], device=order.device) < count[:, None]
    # Behind its own tokens a row may repeat any of them.
    return torch.zeros(len(order), size, device=order.device).scatter_add(1, order, counted.float()) > 0


def highest(scores: Tensor, count: Tensor) -> Tensor:
    """The `count` (int64 [B]) tokens of highest score in each row [B, N], bool [B, N]."""
    return leading(scores.argsort(dim=1, descending=True, stable=True), count, scores.shape[1])


def indices(chosen: Tensor, spec: TokensSpec) -> Tensor:
    """A choice (bool [B, N]) as `Selection.kept`, int64 [B, T]."""
    width = keep_count(chosen.shape[1], spec.keep_ratio.numerator, spec.keep_ratio.denominator)
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return torch.where(chosen.gather(1, order), order, -1)


def gathered(tokens: Tensor, kept: Tensor) -> Selection:
    """`kept` [B, T] of the tokens [B, N, E], with zero for what is not finite."""
    return Selection(finite(tokens.gather(1, kept.clamp_min(0)[..., None].expand(-1, -1, tokens.shape[2]))), kept)
