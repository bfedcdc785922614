"""The one view of a vision encoder that the rest of the package uses.

A family's adapter subclasses `VisionTower` and `Block`. Nothing outside this folder names a family's attributes: the
compression rooms see blocks with an output projection (its input is the concatenated head outputs) and a down
projection (its input is the neurons), and a residual stream that can be run block by block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Prior = Literal["cls", "received"]


@dataclass(frozen=True)
class FfnShape:
    """What a block's feed-forward network is made of.

    ``mlp``: down(act(up(x))), `size` neurons. ``linear``: down(up(x)), rank `size`. ``constant``: the down projection's
    bias, `size` 0.
    """

    kind: Literal["mlp", "linear", "constant"]
    size: int


class Block(ABC):
    """One transformer block: attention then feed-forward network, each added to the residual stream."""

    module: nn.Module
    head_dim: int

    @abstractmethod
    def run(self, stream: Tensor) -> Tensor:
        """The residual stream [B, S, D] behind this block."""

    # ── Structure ──

    @property
    @abstractmethod
    def num_heads(self) -> int: ...

    @property
    @abstractmethod
    def ffn_shape(self) -> FfnShape: ...

    @property
    @abstractmethod
    def attention_out(self) -> nn.Linear:
        """Output projection, weight [D, num_heads * head_dim]."""

    @property
    @abstractmethod
    def ffn_in(self) -> nn.Linear:
        """First projection of the FFN, weight [size, D]."""

    @property
    @abstractmethod
    def ffn_out(self) -> nn.Linear:
        """Down projection, weight [D, size]."""

    @property
    @abstractmethod
    def ffn_norm(self) -> nn.Module:
        """Normalisation before the FFN; its input is the residual stream between attention and FFN."""

    # ── Surgery, in place ──

    @abstractmethod
    def keep_heads(self, heads: Sequence[int]) -> None:
        """Remove all other heads: rows and biases of q, k and v, columns of the output projection.

        `head_dim`, the softmax scale and the output projection's bias stay. Without any head the attention is that
        bias (spec C).
        """

    @abstractmethod
    def keep_neurons(self, neurons: Sequence[int]) -> None:
        """Remove all other FFN neurons; without any, the FFN is the down projection's bias."""

    @abstractmethod
    def make_ffn_linear(self, rank: int) -> None:
        """Replace the FFN by down(up(x)) of this rank, without activation; weights are zero until assigned."""

    @torch.no_grad()
    def set_attention_out(self, weight: Tensor, bias: Tensor) -> None:
        """Overwrite the output projection, [D, num_heads * head_dim] and [D]."""
        self.attention_out.weight.copy_(weight)
        self.attention_out.bias.copy_(bias)

    @torch.no_grad()
    def set_ffn_out(self, weight: Tensor, bias: Tensor) -> None:
        """Overwrite the down projection, [D, size] and [D]."""
        self.ffn_out.weight.copy_(weight)
        self.ffn_out.bias.copy_(bias)


class VisionTower(ABC):
    """A vision encoder from pixels to the language model's visual tokens.

    ``blocks`` holds the blocks that the language model's features depend on, in order; a block behind the feature
    layer is no part of the tower.
    """

    tokens_per_image: int
    """Visual tokens without selection, N."""
    blocks: Sequence[Block]

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    # ── Running ──

    @abstractmethod
    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pixels to the first residual stream [B, S, D]. S counts special tokens such as [CLS]."""

    @abstractmethod
    def visual_tokens(self, stream: Tensor) -> Tensor:
        """The stream [B, S, D] without special tokens, [B, N, D]."""

    @abstractmethod
    def attention_prior(self, stream: Tensor, kind: Prior) -> Tensor:
        """Attention that the last block pays to each visual token, head mean, fp32 [B, N].

        `stream` [B, S, D] is the last block's input. ``cls``: the [CLS] query's row. ``received``: mean over the
        visual tokens' rows.
        """

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Visual tokens [B, T, D] into the language model's embedding space [B, T, D_llm]."""

    @abstractmethod
    def example_inputs(self, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random inputs of the processor's shape and scale, for tracing and parity."""

    @abstractmethod
    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise `InfopruneError` when an input's shape does not fit this tower."""

    def run_blocks(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """All blocks. Returns the last block's input and output, both [B, S, D]."""
        before_last = stream
        for block in self.blocks:
            before_last = stream
            stream = block.run(stream)
        return before_last, stream

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """All visual tokens in the language model's space, [B, N, D_llm]."""
        return self.project(self.visual_tokens(self.run_blocks(self.embed(inputs))[1]))

    # ── Structure ──

    def head_counts(self) -> list[int]:
        return [block.num_heads for block in self.blocks]

    def ffn_shapes(self) -> list[FfnShape]:
        return [block.ffn_shape for block in self.blocks]
