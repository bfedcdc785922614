"""One transformer block of any family: where its weights are is a table, what is done to them is written once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models.attention import Context, attend, attend_packed
from infoprune_export.models.modules import BypassFfn, ConstantAttention, ConstantFfn, FactoredFfn, LinearFfn, select

FfnKind = Literal["mlp", "linear", "constant", "factored", "bypass"]


@dataclass(frozen=True)
class FfnShape:
    """What a block's feed-forward network is made of.

    ``mlp``: down(act(up(x))), or down(act(gate(x)) * up(x)), of `size` neurons. ``linear``: down(up(x)), rank `size`.
    ``constant``: the down projection's bias, `size` 0. ``factored``: an mlp of `size` neurons whose projections (those
    in, then down) are products of `ranks`. ``bypass``: an mlp of `size` neurons and, beside it, a linear path from its
    input of the one rank in `ranks`.
    """

    kind: FfnKind
    size: int
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockNames:
    """Attribute names in a family's block.

    `qkv` is one fused projection [3 H head_dim, D] or three. `ffn_in` is one projection, or gate and up; all of them
    have one row per neuron.
    """

    attention: str
    qkv: tuple[str, ...]
    out: str
    ffn: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    attention_norm: str
    ffn_norm: str
    returns_weights: bool = False
    """Whether the family's block takes (output, weights) from its attention."""


class Block:
    """Attention, then feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, module: nn.Module, names: BlockNames, head_dim: int, *, windowed: bool = False) -> None:
        self.module: Any = module
        self.head_dim = head_dim
        self.windowed = windowed
        self._names = names

    def copy(self) -> Block:
        """A block with weights of its own."""
        return Block(copy.deepcopy(self.module), self._names, self.head_dim, windowed=self.windowed)

    # ── Running ──

    def run(self, stream: Tensor, context: Context, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The residual stream behind this block; [B, S, D], or packed [P, D] with segments in `context`.

        `between` sees the stream behind attention, and what it returns is what the FFN is given.
        """
        middle = self.attend(stream, context)
        return self.feed(middle if between is None else between(middle))

    def attend(self, stream: Tensor, context: Context) -> Tensor:
        """The stream behind attention."""
        if self.num_heads:
            return stream + self.attention_out(self.heads(stream, context)).to(stream.dtype)
        # A product over no channels is its bias; not every runtime knows that.
        return stream + self.attention_out.bias.to(stream.dtype)

    def heads(self, stream: Tensor, context: Context) -> Tensor:
        """Concatenated outputs of the heads, [..., num_heads * head_dim]: what the output projection reads."""
        if not self.num_heads:
            return stream[..., :0]
        return self._attended(self.normalised(stream), context)

    def feed(self, stream: Tensor) -> Tensor:
        """The stream behind the FFN, from the one behind attention."""
        hidden = _in_type_of(self.ffn_norm, stream).to(self.ffn_out.weight.dtype)
        return stream + self.ffn(hidden).to(stream.dtype)

    def _attended(self, hidden: Tensor, context: Context) -> Tensor:
        if len(self._names.qkv) == 1:
            return attend_packed(self._fused(hidden, context), context.segments(self.windowed))
        return attend(*self.query_key_value(hidden, context))

    def _fused(self, hidden: Tensor, context: Context) -> Tensor:
        """Queries, keys and values [P, 3, H, head_dim], the first two rotated together."""
        attention = getattr(self.module, self._names.attention)
        fused = getattr(attention, self._names.qkv[0])(hidden).unflatten(-1, (3, self.num_heads, self.head_dim))
        return torch.cat((context.rotate(fused[:, :2]), fused[:, 2:]), dim=1)

    def query_key_value(self, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., H, head_dim] of normalised `hidden` [..., D], rotated as `context` asks."""
        if len(self._names.qkv) == 1:
            query, key, value = self._fused(hidden, context).unbind(1)
            return query, key, value
        attention = getattr(self.module, self._names.attention)
        query, key, value = (
            getattr(attention, name)(hidden).unflatten(-1, (self.num_heads, self.head_dim)) for name in self._names.qkv
        )
        return query, key, value

    def normalised(self, stream: Tensor) -> Tensor:
        """What attention sees of the stream."""
        norm = getattr(self.module, self._names.attention_norm)
        return _in_type_of(norm, stream).to(self.attention_out.weight.dtype)

    # ── Structure ──

    @property
    def num_heads(self) -> int:
        return int(getattr(self.module, self._names.attention).num_heads)

    @property
    def ffn_shape(self) -> FfnShape:
        ffn = getattr(self.module, self._names.ffn)
        if isinstance(ffn, ConstantFfn):
            return FfnShape("constant", 0)
        if isinstance(ffn, FactoredFfn):
            ranks = tuple(getattr(ffn, name).in_features for name in (*self._names.ffn_in, self._names.ffn_out))
            return FfnShape("factored", self.ffn_in.out_features, ranks)
        if isinstance(ffn, BypassFfn):
            return FfnShape("bypass", self.ffn_in.out_features, (ffn.bypass.out_features,))
        return FfnShape("linear" if isinstance(ffn, LinearFfn) else "mlp", self.ffn_out.in_features)

    @property
    def attention_out(self) -> nn.Linear:
        """Output projection, weight [D, num_heads * head_dim]."""
        return getattr(getattr(self.module, self._names.attention), self._names.out)

    @property
    def value_rows(self) -> Tensor:
        """Weight and bias of the value projection side by side, [num_heads * head_dim, D + 1]."""
        value = getattr(getattr(self.module, self._names.attention), self._names.qkv[-1])
        rows = torch.cat([value.weight, value.bias[:, None]], dim=1)
        return rows[-self.num_heads * self.head_dim :]

    @property
    def ffn(self) -> nn.Module:
        """The whole FFN, from [..., D] to what is added to the residual stream."""
        return getattr(self.module, self._names.ffn)

    @property
    def activation(self) -> nn.Module:
        """The FFN's activation; only while the FFN has one."""
        (activation,) = (child for child in self.ffn.children() if not isinstance(child, nn.Linear))
        return activation

    @property
    def ffn_projections(self) -> dict[str, nn.Linear]:
        """Every linear layer of the FFN by role: ``ffn_in``, ``ffn_gate`` of a gated one, ``ffn_out``.

        In a factored FFN these are the outer factors, and ``{role}_factor`` the inner ones; ``ffn_bypass`` is the way
        into a bypass.
        """
        names = self._names
        roles = dict(zip(("ffn_in", "ffn_gate"), reversed(names.ffn_in), strict=False)) | {"ffn_out": names.ffn_out}
        children = dict(self.ffn.named_children())
        named = {
            **roles,
            **{f"{role}_factor": f"{name}_factor" for role, name in roles.items()},
            "ffn_bypass": "bypass",
        }
        return {role: layer for role, name in named.items() if isinstance(layer := children.get(name), nn.Linear)}

    @property
    def ffn_in(self) -> nn.Linear:
        """First projection of the FFN, weight [size, D]; the ungated one of a gated FFN."""
        return getattr(getattr(self.module, self._names.ffn), self._names.ffn_in[-1])

    @property
    def ffn_out(self) -> nn.Linear:
        """Down projection, weight [D, size]."""
        return getattr(getattr(self.module, self._names.ffn), self._names.ffn_out)

    @property
    def ffn_norm(self) -> nn.Module:
        """Normalisation before the FFN; its input is the residual stream between attention and FFN."""
        return getattr(self.module, self._names.ffn_norm)

    def part(self, name: str) -> list[nn.Module]:
        """The modules of ``attention`` or ``ffn``, its norm first, or both ``norms``."""
        norms = getattr(self.module, self._names.attention_norm), self.ffn_norm
        attention = getattr(self.module, self._names.attention)
        parts: dict[str, list[nn.Module]] = {
            "attention": [norms[0], attention],
            "ffn": [norms[1], self.ffn],
            "norms": list(norms),
        }
        return parts[name]

    # ── Surgery, in place ──

    def keep_heads(self, heads: Sequence[int]) -> None:
        """Remove all other heads: rows and biases of q, k and v, columns of the output projection.

        `head_dim`, the softmax scale and the output projection's bias stay. Without any head the attention is that
        bias (spec C).
        """
        names = self._names
        attention = getattr(self.module, names.attention)
        if not heads:
            constant = ConstantAttention(names.out, self.attention_out.bias, returns_weights=names.returns_weights)
            setattr(self.module, names.attention, constant)
            return
        channels = [head * self.head_dim + channel for head in heads for channel in range(self.head_dim)]
        parts = 3 // len(names.qkv)
        width = self.num_heads * self.head_dim
        rows = [part * width + channel for part in range(parts) for channel in channels]
        for name in names.qkv:
            setattr(attention, name, select(getattr(attention, name), rows, dim=0))
        setattr(attention, names.out, select(self.attention_out, channels, dim=1))
        attention.num_heads = len(heads)

    def keep_neurons(self, neurons: Sequence[int]) -> None:
        """Remove all other FFN neurons; without any, the FFN is the down projection's bias.

        Raises:
            InfopruneError: the FFN is factored or has a bypass, so its projections' extents are no neurons.
        """
        names = self._names
        if (kind := self.ffn_shape.kind) in ("factored", "bypass"):
            raise InfopruneError(f"no neurons can be taken out of a {kind} FFN; prune the original model")
        if not neurons:
            setattr(self.module, names.ffn, ConstantFfn(names.ffn_in, names.ffn_out, self.ffn_out.bias))
            return
        ffn = getattr(self.module, names.ffn)
        for name in names.ffn_in:
            setattr(ffn, name, select(getattr(ffn, name), neurons, dim=0))
        setattr(ffn, names.ffn_out, select(self.ffn_out, neurons, dim=1))

    def make_ffn_linear(self, rank: int) -> None:
        """Replace the FFN by down(up(x)) of this rank, without activation; weights are zero until assigned."""
        names, old = self._names, self.ffn_out
        linear = LinearFfn(
            names.ffn_in[-1],
            names.ffn_out,
            old.out_features,
            rank,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        setattr(self.module, names.ffn, linear.requires_grad_(old.weight.requires_grad))

    def make_ffn_factored(self, ranks: Sequence[int]) -> None:
        """Make a product of these ranks of each projection (those in, then down); weights are zero until assigned."""
        names, old = self._names, self.ffn_out
        factored = FactoredFfn(
            names.ffn_in,
            names.ffn_out,
            self.activation,
            old.out_features,
            old.in_features,
            ranks,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        setattr(self.module, names.ffn, factored.requires_grad_(old.weight.requires_grad))

    def make_ffn_bypass(self, rank: int) -> None:
        """Add a linear path of this rank beside the neurons; it is zero until assigned."""
        names, ffn = self._names, self.ffn
        ins = {name: getattr(ffn, name) for name in names.ffn_in}
        setattr(self.module, names.ffn, BypassFfn(ins, (names.ffn_out, self.ffn_out), self.activation, rank))

    @torch.no_grad()
    def set_attention_out(self, weight: Tensor, bias: Tensor) -> None:
        """Overwrite the output projection, [D, num_heads * head_dim] and [D]."""
        self.attention_out.weight.copy_(weight)
        self.attention_out.bias.copy_(bias)

    @torch.no_grad()
    def set_ffn_out(self, weight: Tensor, bias: Tensor) -> None:
        """Overwrite the down projection (the outer factor of it), [D, its inputs] and [D]."""
        self.ffn_out.weight.copy_(weight)
        self.ffn_out.bias.copy_(bias)


def _in_type_of(norm: nn.Module, stream: Tensor) -> Tensor:
    """A norm of the stream in the norm's own type, which is wider where its part is kept in fp32."""
    normalised: Tensor = norm(stream.to(next(norm.parameters()).dtype))
    return normalised
