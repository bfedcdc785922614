"""What takes the place of a pruned attention or FFN inside a Hugging Face block.

The replacements answer to the calls of the block they stand in, and keep their weights under the names of what they
replace, empty ones included: a loader that does not know about pruning then stops at a shape instead of filling in
random weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import prune_linear_layer


def select(layer: nn.Linear, index: Sequence[int], dim: int) -> nn.Linear:
    """Keep these outputs (dim 0, biases too) or inputs (dim 1), in the layer's own dtype."""
    kept = prune_linear_layer(layer, torch.as_tensor(index, device=layer.weight.device), dim)
    return kept.to(layer.weight.dtype).requires_grad_(layer.weight.requires_grad)


def empty_linear(inputs: int, outputs: int, **factory: Any) -> nn.Linear:
    """A Linear without weights, and without torch's warning that there is nothing to initialise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Linear(inputs, outputs, **factory)


class ConstantAttention(nn.Module):
    """Attention without heads: the output projection's bias at every position (spec C).

    The projection stays as a Linear(0, D) under its own name. `returns_weights` is what the block expects: a pair of
    output and attention weights, or the output alone.
    """

    def __init__(self, out_name: str, bias: nn.Parameter, *, returns_weights: bool) -> None:
        super().__init__()
        projection = empty_linear(0, len(bias), device=bias.device, dtype=bias.dtype)
        projection.bias = bias
        self.add_module(out_name, projection)
        self.requires_grad_(bias.requires_grad)
        self._out_name = out_name
        self._returns_weights = returns_weights
        self.num_heads = 0

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        constant = self.get_parameter(f"{self._out_name}.bias").expand_as(hidden_states)
        return (constant, None) if self._returns_weights else constant


class ConstantFfn(nn.Module):
    """FFN without neurons: the down projection's bias at every position."""

    def __init__(self, in_names: Sequence[str], out_name: str, bias: nn.Parameter) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": bias.device, "dtype": bias.dtype}
        for name in in_names:
            self.add_module(name, empty_linear(len(bias), 0, **factory))
        projection = empty_linear(0, len(bias), **factory)
        projection.bias = bias
        self.add_module(out_name, projection)
        self.requires_grad_(bias.requires_grad)
        self._out_name = out_name

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.get_parameter(f"{self._out_name}.bias").expand_as(hidden_states)


class LinearFfn(nn.Module):
    """FFN without activation: down(up(x)) of some rank; weights are zero until assigned."""

    def __init__(self, in_name: str, out_name: str, size: int, rank: int, **factory: Any) -> None:
        super().__init__()
        self.add_module(in_name, nn.Linear(size, rank, bias=False, **factory))
        self.add_module(out_name, nn.Linear(rank, size, **factory))
        self._names = (in_name, out_name)
        if factory["device"].type != "meta":
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for name in self._names:
            hidden_states = self.get_submodule(name)(hidden_states)
        return hidden_states
