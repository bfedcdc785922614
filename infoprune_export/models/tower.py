"""The one view of a vision encoder that the rest of the package uses.

A family's adapter subclasses `VisionTower` and fills `Block` with a table of names. Nothing outside this folder names a
family's attributes: the compression rooms see blocks with an output projection (its input is the concatenated head
outputs) and a down projection (its input is the neurons), and a residual stream that can be run block by block.

Three steps lead from images to visual tokens:

1. The family's own processor makes *inputs* of them (``pixel_values`` and, by family, grids or sizes).
2. `VisionTower.plan` turns inputs into *planned* tensors on the host: everything that is control flow on data (windows,
   segments, tiles) becomes an index array. These are also what an exported graph takes.
3. `embed`, `run_blocks`, `visual_tokens` and `project` compute; they trace on every size.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models.attention import Context
from infoprune_export.models.block import Block, BlockNames, FfnShape
from infoprune_export.models.boundaries import EMBEDDING, TOKENS, behind_attention, behind_block, mark

__all__ = ["Activations", "Block", "BlockNames", "Context", "FfnShape", "Form", "Layout", "Prior", "VisionTower"]

Prior = Literal["cls", "received", "value"]
Inputs = Mapping[str, Tensor]
"""What a processor returns for a batch of images."""
Planned = Mapping[str, Tensor]
"""What an encoder computes from; see `VisionTower.plan`."""


@dataclass(frozen=True)
class Form:
    """Which graph of an encoder is meant; the planned tensors differ."""

    several: bool = True
    """Several images per call. One image needs no segments for full attention, so its graph is faster."""
    selecting: bool = False
    """Visual tokens are selected. Images of different sizes are then padded to one number of tokens."""


@dataclass(frozen=True)
class Layout:
    """Where one image's visual tokens stand in the language model's positions."""

    ids: Tensor
    """int64 [A, N], relative to the first token's; A = 1, or 3 (time, row, column) under M-RoPE."""
    advance: int
    """How much further than the first token the text behind the image starts."""


@dataclass(frozen=True)
class Activations:
    """The residual stream where something is read from it."""

    before_last: Tensor
    """Input of the last block."""
    last: Tensor
    """Output of the last block."""
    taps: Mapping[int, Tensor] = field(default_factory=dict)
    """Outputs of the blocks in `VisionTower.tapped`."""


class VisionTower(ABC):
    """A vision encoder from pixels to the language model's visual tokens.

    ``blocks`` holds the blocks that the language model's features depend on, in order; a block behind the feature
    layer is no part of the tower. Streams are [B, S, D], or packed [P, D] in a family whose images differ in size.
    """

    ragged: ClassVar[bool] = False
    """Whether images differ in their number of visual tokens. Tokens of several images then follow each other."""
    priors: Sequence[Prior] = ("received", "value")
    """Token priors that this tower's attention can give."""
    position_axes: ClassVar[int] = 1
    """Rows of `Layout.ids`."""
    tapped: Sequence[int] = ()
    """Blocks whose output is part of the features, besides the last one's."""
    selection_width: int | None = None
    """Leading channels of `visual_tokens` that selection compares; None for all of them."""
    blocks: Sequence[Block]
    wide_stream: bool = False
    """Whether the residual stream is fp32 in a tower of a narrower type; see `precision.keep_fp32`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    # ── Planning, on the host ──

    @abstractmethod
    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise `InfopruneError` when an input is missing or its shape does not fit this tower."""

    @abstractmethod
    def layouts(self, inputs: Inputs) -> list[Layout]:
        """One layout per image: how many visual tokens it has without selection, and where they stand."""

    def plan(self, inputs: Inputs, form: Form) -> dict[str, Tensor]:
        """Planned tensors for one call; a graph's inputs, in its order."""
        return {"pixel_values": inputs["pixel_values"]}

    def split(self, inputs: Inputs) -> list[dict[str, Tensor]]:
        """The inputs of each image alone."""
        return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(len(inputs["pixel_values"]))]

    def calls(self, inputs: Inputs, form: Form) -> list[dict[str, Tensor]]:
        """Planned tensors for as many calls of a graph of this form as the images need."""
        if self.ragged and not form.several:
            return [self.plan(one, form) for one in self.split(inputs)]
        return [self.plan(inputs, form)]

    @abstractmethod
    def dynamic_shapes(self, form: Form) -> dict[str, dict[int, Any]]:
        """Which extents of the planned tensors vary, as ``torch.export`` dimensions."""

    @abstractmethod
    def example_inputs(self, images: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs of the processor's shape and scale, for tracing and parity; sizes differ where they may."""

    @abstractmethod
    def pictures(self, inputs: Inputs) -> list[tuple[Tensor, int, int]]:
        """Each image as the tower sees it, normalised [3, H, W], with rows and columns of visual tokens over it."""

    # ── Running ──

    @abstractmethod
    def embed(self, planned: Planned) -> tuple[Tensor, Context]:
        """Pixels to the first residual stream, and what the blocks need besides it. S counts special tokens ([CLS])."""

    def run_blocks(self, stream: Tensor, context: Context, observed: Collection[int] = ()) -> Activations:
        """All blocks; the outputs of the `observed` ones are kept besides those of `tapped`."""
        stream = mark(stream.float() if self.wide_stream else stream, EMBEDDING)
        before_last, taps = stream, {}
        for number, block in enumerate(self.blocks):
            before_last = stream
            # As one call, which `training.recompute` replaces.
            stream = block.run(stream, context, functools.partial(mark, name=behind_attention(number)))
            stream = mark(stream, behind_block(number))
            if number in self.tapped or number in observed:
                taps[number] = stream
        return Activations(before_last, stream, taps)

    @abstractmethod
    def visual_tokens(self, activations: Activations, planned: Planned) -> Tensor:
        """What selection chooses from, [B, N, E].

        Where images differ in size, N is the largest's, see `token_counts`; without selection all images follow each
        other in one row.
        """

    def token_counts(self, tokens: Tensor, planned: Planned) -> Tensor:
        """How many of the `visual_tokens` [B, N, E] of each image are its own, int64 [B]; the rest is padding."""
        if "token_counts" in planned:
            return planned["token_counts"]
        return torch.full((tokens.shape[0],), tokens.shape[1], dtype=torch.long, device=tokens.device)

    @abstractmethod
    def attention_prior(
        self, activations: Activations, context: Context, planned: Planned, kind: Prior, block: int = -1
    ) -> Tensor:
        """Attention that a block, by default the last, pays to each visual token, head mean, fp32 [B, N].

        ``cls``: the [CLS] query's row. ``received``: mean over the visual tokens' rows. ``value``: the same, times the
        norm of the value that is attended to. For another block than the last, the one in front of it must have been
        observed.

        Raises:
            InfopruneError: no head is left in the block, or it attends within windows only.
        """

    @abstractmethod
    def attention_keys(self, activations: Activations, context: Context, planned: Planned) -> Tensor:
        """Head-mean keys of the last block for each visual token, [B, N, head_dim]."""

    @abstractmethod
    def token_grids(self, planned: Planned) -> list[tuple[int, int]]:
        """Rows and columns of each image's visual tokens, for a call that selects; one row where they form no grid."""

    @abstractmethod
    def readers(self) -> list[nn.Module]:
        """The modules behind the last block, which read the residual stream."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Visual tokens [B, T, E] into the language model's embedding space [B, T, D_llm]."""

    def assemble(self, activations: Activations, planned: Planned) -> Tensor:
        """All visual tokens as the language model takes them without selection, [B, N, D_llm]."""
        return self.project(mark(self.visual_tokens(activations, planned), TOKENS))

    def kept_positions(self, kept: Tensor, planned: Planned) -> Tensor:
        """Kept indices int64 [B, T] into `visual_tokens` as indices into the image's `Layout.ids`."""
        return kept

    def features(self, planned: Planned) -> Tensor:
        """Pixels to all visual tokens in the language model's space, [B, N, D_llm]."""
        stream, context = self.embed(planned)
        return self.assemble(self.run_blocks(stream, context), planned)

    def features_of(self, inputs: Inputs) -> Tensor:
        """`features` of a processor's outputs."""
        return self.features(self.plan(inputs, Form()))

    def example_planned(self, images: int, generator: torch.Generator, form: Form) -> dict[str, Tensor]:
        """`plan` of `example_inputs`."""
        return self.plan(self.example_inputs(images, generator), form)

    # ── Structure ──

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding's weights, and of all others but those that are kept in fp32."""
        return next(self.model.parameters()).dtype

    def head_counts(self) -> list[int]:
        return [block.num_heads for block in self.blocks]

    def ffn_shapes(self) -> list[FfnShape]:
        return [block.ffn_shape for block in self.blocks]

    def _attending(
        self, activations: Activations, context: Context, block: int
    ) -> tuple[Block, Tensor, Tensor, Tensor]:
        """A block, with its queries, keys and values [..., H, head_dim]."""
        number = block % len(self.blocks)
        stream = activations.before_last if number == len(self.blocks) - 1 else activations.taps[number - 1]
        chosen = self.blocks[number]
        if not chosen.num_heads:
            raise InfopruneError(f"block {number} has no attention head left, so it gives no token prior; keep one")
        if chosen.windowed:
            raise InfopruneError(f"block {number} attends within windows only, so it gives no token prior")
        return chosen, *chosen.query_key_value(chosen.normalised(stream), context)


def require(inputs: Mapping[str, Any], *names: str) -> None:
    """Raise `InfopruneError` when one of the inputs is not there."""
    for name in names:
        if name not in inputs:
            raise InfopruneError(f"{name} is missing; pass everything that the model's own processor returns")


def image_noise(images: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Coarse noise enlarged, [images, 3, height, width]: smooth like a photograph, so that attention is not uniform."""
    coarse = torch.randn(images, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
