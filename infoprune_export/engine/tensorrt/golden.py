"""Golden cases of a kit: what PyTorch computes in fp32 for calls over the whole of an optimisation profile.

A case with selection also holds what the choice was made from. A device that keeps other tokens can then be judged
without PyTorch: by replaying the greedy rule, not by comparing names of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from infoprune_export.models.llava_next import LlavaNextTower
from infoprune_export.models.qwen import QwenTower
from infoprune_export.models.tower import VisionTower, image_noise
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.tokens.select import EPSILON, weighting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from infoprune_export.engine.tensorrt.profiles import Profile
    from infoprune_export.models.tower import Form, Inputs
    from infoprune_export.recipe import EngineSpec, TokensSpec

Size = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One call."""

    name: str
    images: int
    arrays: dict[str, NDArray[Any]]
    """``input.NAME``, ``output.NAME`` and, with selection, ``replay.NAME``: tokens fp32 [B, N, E], their weighted prior
    fp32 [B, N], their positions int64 [B, N] as kept_indices name them, and how many each image has, int64 [B]."""


def golden_cases(
    tower: VisionTower, tokens: TokensSpec, several: bool | None, spec: EngineSpec, profile: Profile, seed: int
) -> Iterator[Case]:
    """The profile's least, usual and largest call and some between; one at a time, because a case may be large.

    The tower is fp32 and on the CPU; `several` as in `form_of`. Inputs are random, and the same for the same seed.
    """
    encoder = VisionEncoder(tower, tokens, several).eval()
    for number, (name, sizes) in enumerate(call_sizes(tower, encoder.form, spec).items()):
        generator = torch.Generator().manual_seed(seed + number)
        planned = tower.plan(images_of(tower, sizes, generator), encoder.form)
        if profile.covers({key: tuple(value.shape) for key, value in planned.items()}) is not None:
            continue  # a mixture may be smaller than the least call
        with torch.inference_mode():
            arrays = {f"input.{key}": value for key, value in planned.items()}
            arrays |= {f"output.{key}": value for key, value in encoder.run(planned).items()}
            if encoder.form.selecting:
                arrays |= {f"replay.{key}": value for key, value in _choice(encoder, tokens, planned).items()}
        yield Case(name, len(sizes), {key: _array(value) for key, value in arrays.items()})


def selection_settings(tower: VisionTower, tokens: TokensSpec, margin: float) -> dict[str, Any]:
    """What replaying a choice needs besides a case's arrays, in plain values.

    A merge counts as certain when it leads by `margin` in cosine similarity.
    """
    softmax = tokens.quality == "softmax"
    return {
        "width": tower.selection_width,
        "normalize": tokens.normalize,
        "pool_factor": tokens.pool_factor,
        "temperature": tokens.temperature if softmax else 1.0,
        "exponent": tokens.exponent,
        "epsilon": EPSILON,
        "merge": tokens.merge,
        "merge_above": tokens.merge_above,
        "merge_margin": margin,
    }


def _choice(encoder: VisionEncoder, tokens: TokensSpec, planned: dict[str, Tensor]) -> dict[str, Tensor]:
    candidates = encoder.candidates(planned)
    prior, _ = weighting(candidates.prior(tokens.prior), tokens)
    everything = torch.arange(candidates.tokens.shape[1]).expand(len(candidates.counts), -1)
    return {
        "tokens": candidates.tokens,
        "prior": prior,
        "counts": candidates.counts,
        "positions": candidates.tower.kept_positions(everything, planned),
    }


def _array(value: Tensor) -> NDArray[np.generic]:
    return value.contiguous().numpy()


# ── Sizes and images ─────────────────────────────────────────────────────────


def call_sizes(tower: VisionTower, form: Form, spec: EngineSpec) -> dict[str, list[Size]]:
    """Height and width in pixels of every image of every call, by the call's name."""
    least, usual, most = spec.images if form.several or not tower.ragged else (1, 1, 1)
    small, middle, large = spec.image_sizes
    calls = {"min": [small] * least, "opt": [middle] * usual, "max": [large] * most}
    if tower.ragged:
        tall, wide = (large[0], small[1]), (small[0], large[1])
        calls |= {"tall": [tall] * usual, "wide": [wide] * usual}
        mixture = [middle, small, tall, wide, large]
        if most > 1:
            calls["mixed"] = [mixture[i % len(mixture)] for i in range((usual + most + 1) // 2)]
    else:
        calls |= {"between": [middle] * ((least + usual) // 2), "high": [middle] * ((usual + most) // 2)}
    distinct: dict[str, list[Size]] = {}
    for name, sizes in calls.items():
        # Only families of any size look at it.
        same = [(0, 0)] * len(sizes) if not tower.ragged else sizes
        if same not in distinct.values():
            distinct[name] = same
    return distinct


def images_of(tower: VisionTower, sizes: list[Size], generator: torch.Generator) -> Inputs:
    """Random inputs of a processor for images of these heights and widths."""
    if isinstance(tower, QwenTower):
        unit = tower.patch_size * tower.merge
        grids = [(1, *(max(1, round(side / unit)) * tower.merge for side in size)) for size in sizes]
        return tower.grid_inputs([(f, r, c) for f, r, c in grids], generator)
    if isinstance(tower, LlavaNextTower):
        side, config = tower.image_size, cast(Any, tower.model).config
        tiles = 1 + max(height // side * (width // side) for height, width in config.image_grid_pinpoints)
        pixels = image_noise(len(sizes) * tiles, side, side, generator).unflatten(0, (len(sizes), tiles))
        return {"pixel_values": pixels, "image_sizes": torch.tensor([list(size) for size in sizes])}
    return tower.example_inputs(len(sizes), generator)
