"""What the sweep tries a family on, and what the family's Hugging Face model makes of it, the reference.

A case is one batch of images and one of `KINDS`. Grids and image sizes are listed where their number is small enough,
and drawn with a fixed seed where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from infoprune_export.models.llava_next import LlavaNextTower
from infoprune_export.models.packing import Grid
from infoprune_export.models.qwen import QwenTower
from infoprune_export.models.tower import Inputs, VisionTower, image_noise

Kind = Literal["whole", "cut", "several", "video"]
KINDS: dict[Kind, str] = {
    "whole": "whole windows",
    "cut": "cut windows",
    "several": "several images",
    "video": "videos",
}
"""One image whose attention windows (LLaVA-NeXT: tiles) are all full, or not; and what is more than one image."""

_SIDES = range(4, 41, 2)
_EXTREMES = ((2, 2), (2, 4), (6, 2), (2, 80), (80, 2), (4, 120), (120, 4), (2, 200), (48, 56))
_MIXTURES = 40
# Heights and widths in pixels around the multiples of a tiny LLaVA-NeXT's 56-pixel tiles.
_PIXELS = (5, 20, 33, 55, 56, 57, 84, 112, 113, 150, 168, 169, 224, 333, 600)
_PIXEL_EXTREMES = ((1, 1), (1, 700), (700, 1), (3, 900), (900, 3), (31, 2000), (2000, 31))

Features = NDArray[np.float32]
"""All visual tokens of a batch one after the other, [tokens, channels]."""


@dataclass(frozen=True)
class Case:
    """One batch of images."""

    kind: Kind
    label: str
    make: Callable[[], dict[str, Tensor]]
    """The processor's outputs for it; made anew, because all of them together would be large."""
    alone: bool = True
    """One image of one frame."""


def cases_of(tower: VisionTower, model: Any) -> list[Case]:
    """What a family is tried on; the same list every time."""
    if isinstance(tower, QwenTower):
        return _grid_cases(tower, model)
    if isinstance(tower, LlavaNextTower):
        return _tile_cases(tower, model)
    return [
        Case(
            "whole" if batch == 1 else "several",
            f"batch {batch}, seed {seed}",
            partial(_example, tower, batch, seed),
            batch == 1,
        )
        for seed in range(3)
        for batch in range(1, 6)
    ]


def _example(tower: VisionTower, images: int, seed: int) -> dict[str, Tensor]:
    return tower.example_inputs(images, torch.Generator().manual_seed(seed))


def _grid_cases(tower: QwenTower, model: Any) -> list[Case]:
    vision = model.config.vision_config
    # Without window attention nothing is cut.
    windowed = getattr(vision, "fullatt_block_indexes", None) is not None
    window = vision.window_size // vision.patch_size if windowed else tower.merge
    draw = np.random.default_rng(0)

    def case(kind: Kind, *grids: Grid) -> Case:
        label = " + ".join(" x ".join(map(str, grid)) for grid in grids)
        seed = int(draw.integers(2**31))
        return Case(
            kind,
            label,
            lambda: tower.grid_inputs(grids, torch.Generator().manual_seed(seed)),
            len(grids) == grids[0][0] == 1,
        )

    def side() -> int:
        whole = bool(draw.integers(2))
        return int(window * draw.integers(1, 1 + max(1, 32 // window)) if whole else 2 * draw.integers(1, 17))

    frames = [(rows, columns) for rows in _SIDES for columns in _SIDES]
    cases = []
    for rows, columns in (*frames, *_EXTREMES):
        whole = rows % window == columns % window == 0
        cases.append(case("whole" if whole else "cut", (1, rows, columns)))
    # Images of one size are the easier half for whoever cuts a batch into equal parts; a few of them belong here too.
    cases += [case("several", *[(1, side(), side())] * images) for images in (2, 3) for _ in range(2)]
    cases += [case("several", (1, 16, 24), (1, 10, 14)), case("several", (1, 8, 8), (1, 2, 2), (1, 40, 2))]
    cases += [case("several", *[(1, side(), side()) for _ in range(2 + number % 2)]) for number in range(_MIXTURES - 6)]
    for count in (2, 3):
        cases += [case("video", (count, side(), side())) for _ in range(8)]
        cases += [case("video", (count, side(), side()), (1, side(), side())) for _ in range(4)]
        cases += [case("video", (1, side(), side()), (count, side(), side()), (5 - count, side(), side()))]
    return cases


def _tile_cases(tower: LlavaNextTower, model: Any) -> list[Case]:
    points, tile = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    draw = np.random.default_rng(0)

    def grid(size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = get_anyres_image_grid_shape(size, points, tile)
        return int(rows), int(columns)

    def make(sizes: Sequence[tuple[int, int]], seed: int) -> dict[str, Tensor]:
        # Where an image has fewer tiles than the largest there is noise too, which must not matter.
        tiles = 1 + max(rows * columns for rows, columns in map(grid, sizes))
        noise = image_noise(len(sizes) * tiles, tile, tile, torch.Generator().manual_seed(seed))
        return {"pixel_values": noise.unflatten(0, (len(sizes), tiles)), "image_sizes": torch.tensor(sizes)}

    def case(kind: Kind, *sizes: tuple[int, int]) -> Case:
        label = " + ".join(f"{height} x {width} pixels" for height, width in sizes)
        return Case(kind, label, partial(make, sizes, int(draw.integers(2**31))), len(sizes) == 1)

    def size() -> tuple[int, int]:
        height, width = draw.integers(1, 12 * tile, size=2)
        return int(height), int(width)

    cases = []
    for height, width in (*((h, w) for h in _PIXELS for w in _PIXELS), *_PIXEL_EXTREMES):
        rows, columns = grid((height, width))
        # Padding is cut away unless the image has its grid's shape.
        cases.append(case("whole" if height * columns == width * rows else "cut", (height, width)))
    cases += [case("several", *[size() for _ in range(2 + number % 2)]) for number in range(_MIXTURES)]
    return cases


def model_features(model: Any, inputs: Inputs) -> Features:
    """What a Hugging Face model computes itself; deepstack features behind each token's channels."""
    with torch.no_grad():
        outputs = model.get_image_features(**inputs)
    parts = [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or ())]
    return torch.cat([torch.cat(list(part)) for part in parts], dim=-1).numpy()
