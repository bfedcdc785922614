"""The one interface of all visual-token selectors: what they see, what they answer, and where they are.

A selector is a function ``select(candidates, spec) -> Selection``. The method of this package and the published ones it
is compared with differ in nothing else, so a recipe changes ``tokens.method`` to compare them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

from infoprune_export.models.boundaries import PRIOR, TOKENS, mark
from infoprune_export.models.tower import Activations, Context, Inputs, Planned, Prior, VisionTower
from infoprune_export.recipe import TokensSpec


@dataclass(frozen=True)
class Candidates:
    """The visual tokens of one encoder call: B images, padded to the N tokens of the largest."""

    tower: VisionTower
    activations: Activations
    context: Context
    planned: Planned

    @cached_property
    def tokens(self) -> Tensor:
        """What is chosen from, [B, N, E]; in front of the projector, or behind the merger of a Qwen tower."""
        return mark(self.tower.visual_tokens(self.activations, self.planned), TOKENS)

    @cached_property
    def compared(self) -> Tensor:
        """The channels of `tokens` that similarity is measured on, [B, N, D]."""
        return self.tokens[..., : self.tower.selection_width]

    @cached_property
    def counts(self) -> Tensor:
        """How many of its N tokens are each image's own, int64 [B]."""
        return self.tower.token_counts(self.tokens, self.planned)

    @cached_property
    def embeddings(self) -> Tensor:
        """`tokens` as the language model would take them, [B, N, D_llm]."""
        return self.tower.project(self.tokens)

    @cached_property
    def keys(self) -> Tensor:
        """Head-mean keys of the last block, [B, N, head_dim]."""
        return self.tower.attention_keys(self.activations, self.context, self.planned)

    @cached_property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of each image's tokens."""
        return self.tower.token_grids(self.planned)

    def prior(self, kind: Prior, block: int = -1) -> Tensor:
        """Attention that each token receives in a block, fp32 [B, N]."""
        return mark(self.tower.attention_prior(self.activations, self.context, self.planned, kind, block), PRIOR)


@dataclass(frozen=True)
class Selection:
    """What is left of each image."""

    tokens: Tensor
    """[B, T, E], the place of `Candidates.tokens`."""
    kept: Tensor
    """int64 [B, T], ascending: which candidates these are, or stand for; -1 behind the last one of a smaller image."""


Select: TypeAlias = Callable[[Candidates, TokensSpec], Selection]
Shrink: TypeAlias = Callable[[VisionTower, Inputs, TokensSpec], tuple[dict[str, Tensor], list[Tensor]]]
"""Smaller inputs, all of whose tokens are kept, and where these stand in each image's `Layout.ids`, int64 [T]."""


@dataclass(frozen=True)
class Method:
    """A registered selector; its module is imported when it is used."""

    where: str
    """``module:function`` of its `Select`, or of its `Shrink`."""
    exported: bool = False
    """Whether it can be part of an ONNX graph."""
    observes: Callable[[VisionTower], Sequence[int]] = lambda tower: ()
    """Blocks whose outputs it needs besides the last one's."""
    before: bool = False
    """Whether it is a `Shrink`: it acts on the images in front of the tower, and nothing is chosen behind it."""

    def load(self) -> Select:
        select: Select = _function(self.where)
        return select

    def load_shrink(self) -> Shrink:
        shrink: Shrink = _function(self.where)
        return shrink


def _function(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


_BASELINES = "infoprune_export.tokens.baselines."

METHODS: dict[str, Method] = {
    "infoprune": Method("infoprune_export.tokens.select:select_and_merge", exported=True),
    "random": Method(_BASELINES + "spatial:random"),
    "stride": Method(_BASELINES + "spatial:stride"),
    "pool": Method(_BASELINES + "spatial:pool"),
    "downsample": Method(_BASELINES + "downsample:shrink", before=True),
    "fastervlm": Method(_BASELINES + "attention:fastervlm"),
    "visionzip": Method(_BASELINES + "attention:visionzip"),
    "divprune": Method(_BASELINES + "diversity:divprune"),
    "cdpruner": Method(_BASELINES + "diversity:cdpruner"),
    "vscan": Method(_BASELINES + "vscan:vscan", observes=lambda tower: _function(_BASELINES + "vscan:observed")(tower)),
}
