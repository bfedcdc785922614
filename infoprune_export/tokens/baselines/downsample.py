"""The control in front of the tower: fewer pixels instead of fewer tokens (VTC-Bench, arXiv 2510.07143)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from infoprune_export.errors import InfopruneError
from infoprune_export.models.tower import Inputs, VisionTower
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.select import keep_count


@runtime_checkable
class Resizable(Protocol):
    """A tower that takes images of another size than its processor's."""

    def of_pictures(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inputs from normalised images [3, H, W] whose sides are multiples of a visual token's."""


def shrink(tower: VisionTower, inputs: Inputs, spec: TokensSpec) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Each image shrunk (bicubic, antialiased) to the largest grid of at most T tokens near its aspect ratio.

    CLIP and SigLIP interpolate their positional embedding; a Qwen tower sees a smaller image. The tokens stand in the
    language model where the middles of their areas were in the image's own layout.

    Raises:
        InfopruneError: tiles or videos.
    """
    if not isinstance(tower, Resizable):
        raise InfopruneError(
            f"tokens.method = 'downsample': {type(tower).__name__} takes images of its processor's size only; use "
            "another method"
        )
    small, places = [], []
    for (picture, rows, columns), layout in zip(tower.pictures(inputs), tower.layouts(inputs), strict=True):
        tokens = layout.ids.shape[1]
        if rows * columns != tokens:
            raise InfopruneError(
                f"tokens.method = 'downsample': an image has {tokens} visual tokens, {rows} x {columns} of them over "
                "its picture; tiles and videos are not shrunk, use another method"
            )
        fewer = smaller_grid(rows, columns, keep_count(tokens, spec.keep_ratio.numerator, spec.keep_ratio.denominator))
        size = [extent // old * new for extent, old, new in zip(picture.shape[1:], (rows, columns), fewer, strict=True)]
        wide = F.interpolate(picture[None].float(), size, mode="bicubic", antialias=True)[0]
        small.append(wide.to(picture.dtype))
        y, x = (_middles(old, new) for old, new in zip((rows, columns), fewer, strict=True))
        places.append((y[:, None] * columns + x).flatten())
    return tower.of_pictures(small), places


def smaller_grid(rows: int, columns: int, tokens: int) -> tuple[int, int]:
    """Rows and columns with the largest product of at most `tokens`, scaled alike and each rounded up or down.

    Where one of them would be less than 1, the other is `tokens`.
    """
    scale = math.sqrt(tokens / (rows * columns))
    heights, widths = ((math.floor(extent * scale), math.ceil(extent * scale)) for extent in (rows, columns))
    grids = [(height, width) for height in heights for width in widths if 1 <= height * width <= tokens]
    return max(grids, key=math.prod, default=(1, tokens) if rows < columns else (tokens, 1))


def _middles(extent: int, parts: int) -> Tensor:
    """Index of the middle of each of `parts` equal parts."""
    return (2 * torch.arange(parts) + 1) * extent // (2 * parts)
