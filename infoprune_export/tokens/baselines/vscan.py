"""VScan's first stage (arXiv 2505.22654): a local scan, a global scan, and the rest merged into what they chose."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.baselines.common import attention, budgets, finite, highest, indices, leading
from infoprune_export.tokens.select import merge_tokens
from infoprune_export.tokens.selector import Candidates, Selection

_WINDOWS = 16
"""6 x 6 tokens each on the paper's grid of 24 x 24."""
_SHALLOW, _DEPTH = 5, 24
_INERTIA = 1.0


def vscan(candidates: Candidates, spec: TokensSpec) -> Selection:
    """Half of the T tokens by [CLS] attention of a shallow block, equally many per window; half by the last block's.

    The rest is merged into the most similar kept token, x' = (x + sum) / (1 + their number). The paper's shallow block
    is the sixth of 24; of another tower the one at the same depth, or the first behind it that attends globally, which
    for Qwen2.5-VL is the block that the paper takes. Adapted: the grid is cut into 4 x 4 windows whatever its size;
    where windows do not share the local half evenly, the highest attention decides; the global half goes to tokens that
    the local one left; tokens are merged in front of the projector, or behind the merger of a Qwen tower.
    """
    count = budgets(candidates, spec)
    local = windowed(attention(candidates, shallow_block(candidates.tower)), _window_of(candidates), count // 2)
    chosen = local | highest(attention(candidates).masked_fill(local, -torch.inf), count - count // 2)
    kept = indices(chosen, spec)
    return Selection(merge_tokens(finite(candidates.tokens), kept, candidates.counts, _INERTIA), kept)


def shallow_block(tower: VisionTower) -> int:
    """The block of the local scan; the last one where no other from the wanted depth on can give a prior."""
    wanted = max(1, round(_SHALLOW * len(tower.blocks) / _DEPTH))
    able = (n for n, block in enumerate(tower.blocks) if n >= wanted and block.num_heads and not block.windowed)
    return next(able, len(tower.blocks) - 1)


def observed(tower: VisionTower) -> list[int]:
    """The block in front of the shallow one."""
    return [shallow_block(tower) - 1]


def windowed(scores: Tensor, window: Tensor, count: Tensor) -> Tensor:
    """The best token of every window, then the second best of every window, and so on up to `count` of each row.

    scores fp32 [B, N], -inf at padding; window int64 [B, N]; count int64 [B]; bool [B, N]. Within one such round the
    higher score comes first.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    member = F.one_hot(window.gather(1, order))
    turn = (member.cumsum(1) * member).sum(-1)
    turn = turn.masked_fill(scores.gather(1, order) == -torch.inf, scores.shape[1] + 1)
    return leading(order.gather(1, turn.argsort(dim=1, stable=True)), count, scores.shape[1])


@functools.lru_cache(maxsize=256)
def windows(rows: int, columns: int) -> Tensor:
    """The window of each cell of a grid, int64 [rows * columns]: 4 x 4 near-equal ones, or 16 in all on fewer rows."""
    down = min(4, rows)
    across = min(_WINDOWS // down, columns)
    y, x = torch.arange(rows) * down // rows, torch.arange(columns) * across // columns
    return (y[:, None] * across + x).flatten()


def _window_of(candidates: Candidates) -> Tensor:
    window = torch.zeros(candidates.tokens.shape[:2], dtype=torch.long)
    for row, grid in enumerate(candidates.grids):
        own = windows(*grid)
        window[row, : len(own)] = own
    return window.to(candidates.tokens.device)
