"""What the decoder layers of the language model keep, and carrying that out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.models.language import LanguageLayer, check_heads, replace_weights

# Weights that a plan comes with are named "{layer}.{role}.{weight|bias}".
ATTENTION_OUT, FFN_OUT = "attention_out", "ffn_out"


@dataclass(frozen=True)
class LayerSize:
    """Query heads, key-value heads and FFN neurons of one layer."""

    heads: int
    key_value_heads: int
    neurons: int

    @property
    def attention_units(self) -> int:
        """Multiply-accumulates of q, k, v and o per token, in units of 2 * head_dim * D."""
        return self.heads + self.key_value_heads


@dataclass(frozen=True)
class LanguagePlan:
    """``heads[l]`` are the query heads that layer l keeps of ``total[l]``, ``neurons[l]`` the neurons; ascending.

    Key-value heads go with the last query head that attends to them.
    """

    total: tuple[LayerSize, ...]
    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not len(self.total) == len(self.heads) == len(self.neurons):
            raise InfopruneError(
                f"language plan has heads of {len(self.heads)} and neurons of {len(self.neurons)} layers for "
                f"{len(self.total)} layers"
            )
        for layer, (size, heads, neurons) in enumerate(zip(self.total, self.heads, self.neurons, strict=True)):
            for what, kept, count in (("heads", heads, size.heads), ("neurons", neurons, size.neurons)):
                if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
                    raise InfopruneError(
                        f"language plan, layer {layer}: {what} must be ascending, at least one, out of 0..{count - 1}"
                    )
            check_heads(heads, size.heads // size.key_value_heads)

    @property
    def kept(self) -> tuple[LayerSize, ...]:
        """Sizes of the layers when the plan is carried out."""
        sizes = []
        for size, heads, neurons in zip(self.total, self.heads, self.neurons, strict=True):
            groups = check_heads(heads, size.heads // size.key_value_heads)
            sizes.append(LayerSize(len(heads), len(groups), len(neurons)))
        return tuple(sizes)

    @property
    def attention_kept(self) -> float:
        """Fraction of the multiply-accumulates of q, k, v and o that is left; of heads, where none are grouped."""
        return sum(s.attention_units for s in self.kept) / sum(s.attention_units for s in self.total)

    @property
    def ffn_kept(self) -> float:
        """Fraction of the FFN multiply-accumulates that is left."""
        return sum(s.neurons for s in self.kept) / sum(s.neurons for s in self.total)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LanguagePlan:
        return cls(
            tuple(LayerSize(**size) for size in value["total"]),
            tuple(map(tuple, value["heads"])),
            tuple(map(tuple, value["neurons"])),
        )

    @classmethod
    def full(cls, total: Sequence[LayerSize]) -> LanguagePlan:
        """Keep everything."""
        return cls(
            tuple(total),
            tuple(tuple(range(size.heads)) for size in total),
            tuple(tuple(range(size.neurons)) for size in total),
        )


def sizes_of(layers: Sequence[LanguageLayer]) -> tuple[LayerSize, ...]:
    return tuple(LayerSize(layer.num_heads, layer.num_key_value_heads, layer.num_neurons) for layer in layers)


def apply_language(layers: Sequence[LanguageLayer], plan: LanguagePlan, weights: Mapping[str, Tensor]) -> None:
    """Remove heads and neurons in place, then replace the projections that `weights` names.

    Raises:
        InfopruneError: the plan was made for other layers, or a weight does not fit.
    """
    if sizes_of(layers) != plan.total:
        raise InfopruneError(
            f"language plan is for {len(plan.total)} layers of {plan.total[:1]}, the model has {len(layers)} of "
            f"{sizes_of(layers)[:1]}"
        )
    for layer, heads, neurons in zip(layers, plan.heads, plan.neurons, strict=True):
        if len(heads) < layer.num_heads:
            layer.keep_heads(heads)
        if len(neurons) < layer.num_neurons:
            layer.keep_neurons(neurons)
    for number, layer in enumerate(layers):
        for role in (ATTENTION_OUT, FFN_OUT):
            if (weight := weights.get(f"{number}.{role}.weight")) is not None:
                replace_weights(getattr(layer, role), weight, weights.get(f"{number}.{role}.bias"))
