"""What takes the place of a pruned attention or FFN inside a Hugging Face block.

The replacements answer to the calls of the block they stand in, and keep their weights under the names of what they
replace, empty ones included: a loader that does not know about pruning then stops at a shape instead of filling in
random weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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


class FactoredFfn(nn.Module):
    """FFN with its activation whose every projection W [out, in] is a product B A of some rank.

    B [out, k] keeps the projection's name and bias, A [k, in] is the ``{name}_factor`` beside it. Weights are zero
    until assigned. `ranks` follow `in_names`, then `out_name`.
    """

    def __init__(
        self,
        in_names: Sequence[str],
        out_name: str,
        activation: nn.Module,
        features: int,
        neurons: int,
        ranks: Sequence[int],
        **factory: Any,
    ) -> None:
        super().__init__()
        for name, rank in zip((*in_names, out_name), ranks, strict=True):
            inputs, outputs = (neurons, features) if name == out_name else (features, neurons)
            self.add_module(f"{name}_factor", nn.Linear(inputs, rank, bias=False, **factory))
            self.add_module(name, nn.Linear(rank, outputs, **factory))
        self.activation = activation
        self._in_names, self._out_name = tuple(in_names), out_name
        if factory["device"].type != "meta":
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    def _product(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(self.get_submodule(f"{name}_factor")(x))

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts = [self._product(name, hidden_states) for name in self._in_names]
        return self._product(self._out_name, gated(self.activation, parts))


class BypassFfn(nn.Module):
    """FFN with a linear path of some rank from its input around the activation.

    down([hidden; bypass(x)]): the down projection's last columns belong to the bypass, so that one product, and one
    least-squares fit, serves both. Projections `ins` and `out` are those of the FFN whose place it takes, by name; the
    bypass is zero until assigned.
    """

    def __init__(
        self, ins: Mapping[str, nn.Linear], out: tuple[str, nn.Linear], activation: nn.Module, rank: int
    ) -> None:
        super().__init__()
        out_name, old = out
        factory: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
        for name, projection in ins.items():
            self.add_module(name, projection)
        self.bypass = nn.Linear(old.out_features, rank, bias=False, **factory)
        wider = nn.Linear(old.in_features + rank, old.out_features, **factory)
        wider.weight = nn.Parameter(torch.cat((old.weight, old.weight.new_zeros(old.out_features, rank)), dim=1))
        wider.bias = old.bias
        self.add_module(out_name, wider)
        self.activation = activation
        self._in_names, self._out_name = tuple(ins), out_name
        if self.bypass.weight.device.type != "meta":
            nn.init.zeros_(self.bypass.weight)
        self.requires_grad_(old.weight.requires_grad)

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts = [self.get_submodule(name)(hidden_states) for name in self._in_names]
        hidden = torch.cat((gated(self.activation, parts), self.bypass(hidden_states)), dim=-1)
        output: Tensor = self.get_submodule(self._out_name)(hidden)
        return output


def gated(activation: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    """The neurons: act(up), or act(gate) * up where there are two projections."""
    hidden: Tensor = activation(parts[0])
    return hidden if len(parts) == 1 else hidden * parts[1]
