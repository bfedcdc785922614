"""Controls that do not ask what a token shows: random, stride and pool."""

from __future__ import annotations

import functools
import math
import zlib
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.baselines.common import budgets, finite, gathered, indices
from infoprune_export.tokens.selector import Candidates, Selection


def random(candidates: Candidates, spec: TokensSpec, seed: int = 0) -> Selection:
    """T tokens drawn uniformly without replacement.

    The generator is seeded with `seed` (0 .. 2^32 - 1) and the image: with the signs of its first token's channels,
    which rounding does not change. So each image has a choice of its own, the same in every run and batch.
    """
    tokens, keeps = candidates.tokens, budgets(candidates, spec).tolist()
    signs = (candidates.compared[:, 0] > 0).cpu().numpy()
    chosen = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for row, (count, keep) in enumerate(zip(candidates.counts.tolist(), keeps, strict=True)):
        generator = torch.Generator().manual_seed(zlib.crc32(signs[row].tobytes(), seed))
        chosen[row, torch.randperm(count, generator=generator)[:keep]] = True
    return gathered(tokens, indices(chosen.to(tokens.device), spec))


def stride(candidates: Candidates, spec: TokensSpec) -> Selection:
    """Token floor((2 i + 1) n / 2 T) of the raster for i = 0 .. T - 1: the middles of T equal runs."""
    count, keep = candidates.counts[:, None], budgets(candidates, spec)[:, None]
    places = torch.arange(int(keep.max()), device=count.device)
    kept = torch.where(places < keep, (2 * places + 1) * count // (2 * keep.clamp_min(1)), -1)
    return gathered(candidates.tokens, kept)


def pool(candidates: Candidates, spec: TokensSpec) -> Selection:
    """Means over T near-equal rectangles of the grid; each stands at the token nearest to its centre.

    Average pooling for any T. Without a grid (LLaVA-NeXT), means over T runs of the row.
    """
    tokens, keeps = candidates.tokens, budgets(candidates, spec).tolist()
    batch, size, width = *tokens.shape[:2], max(keeps)
    label = torch.full((batch, size), width)
    kept = torch.full((batch, width), -1)
    for row, (grid, keep) in enumerate(zip(candidates.grids, keeps, strict=True)):
        regions, centres = rectangles(*grid, keep)
        label[row, : len(regions)] = regions
        kept[row, :keep] = centres
    share = F.one_hot(label.to(tokens.device), width + 1)[..., :width].transpose(1, 2).float()
    means = share @ finite(tokens).float() / share.sum(-1, keepdim=True).clamp_min(1)
    return Selection(means.to(tokens.dtype), kept.to(tokens.device))


@functools.lru_cache(maxsize=256)
def rectangles(rows: int, columns: int, count: int) -> tuple[Tensor, Tensor]:
    """A grid cut into `count` rectangles: the one of each cell, int64 [rows * columns], and their centres, [count].

    Bands of near-equal height, each cut into as many near-equal parts as its share of the rows asks for. Of all numbers
    of bands that leave no part empty, the one that makes rectangles most nearly square.
    """
    square = math.sqrt(count * rows / columns)
    for bands in sorted(range(1, min(rows, count) + 1), key=lambda bands: abs(bands - square)):
        edges = [band * rows // bands for band in range(bands + 1)]
        parts = [b - a for a, b in pairwise([-(-count * edge // rows) for edge in edges])]
        if min(parts) >= 1 and max(parts) <= columns:
            break
    label = torch.empty(rows, columns, dtype=torch.long)
    centres: list[int] = []
    for (top, bottom), cuts in zip(pairwise(edges), parts, strict=True):
        for left, right in pairwise(cut * columns // cuts for cut in range(cuts + 1)):
            label[top:bottom, left:right] = len(centres)
            centres.append((top + bottom - 1) // 2 * columns + (left + right - 1) // 2)
    return label.flatten(), torch.tensor(centres)
