"""The decoder layers of a vision-language model's text model, as far as pruning has to know them.

Llama, Mistral and the text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL name their projections alike and differ in what
a removed head leaves alone: rotary embedding, M-RoPE and Qwen3's norms of queries and keys work per channel of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models.modules import select
from infoprune_export.tokens.watch import text_model

TEXT_TYPES = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text")


class LanguageLayer:
    """Attention with grouped queries, then a gated FFN, each behind a norm and added to the residual stream.

    Query head h attends to key-value head ``h // group_size``: transformers repeats every key-value head equally often,
    so each kept one needs an equal number of query heads.
    """

    def __init__(self, module: nn.Module, head_dim: int) -> None:
        self.module: Any = module
        self.head_dim = head_dim

    def run(self, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The residual stream [B, L, D] behind this layer; `arguments` is what the text model calls it with."""
        return self.module(stream, **arguments)

    # ── Structure ──

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.module.self_attn.q_proj.out_features // self.head_dim

    @property
    def num_key_value_heads(self) -> int:
        return self.module.self_attn.k_proj.out_features // self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads of each key-value head."""
        return self.num_heads // self.num_key_value_heads

    @property
    def num_neurons(self) -> int:
        return self.ffn_out.in_features

    @property
    def attention_out(self) -> nn.Linear:
        """Output projection, weight [D, num_heads * head_dim]."""
        return self.module.self_attn.o_proj

    @property
    def ffn_in(self) -> tuple[nn.Linear, nn.Linear]:
        """Gate and up, weights [num_neurons, D]."""
        return self.module.mlp.gate_proj, self.module.mlp.up_proj

    @property
    def ffn_out(self) -> nn.Linear:
        """Down projection, weight [D, num_neurons]."""
        return self.module.mlp.down_proj

    @property
    def ffn_norm(self) -> nn.Module:
        """Its input is the residual stream between attention and FFN."""
        return self.module.post_attention_layernorm

    # ── Surgery, in place ──

    def keep_heads(self, heads: Sequence[int]) -> None:
        """Remove all other query heads, and the key-value heads that none of these attends to.

        Raises:
            InfopruneError: no head, or not equally many of each key-value head that stays.
        """
        groups = check_heads(heads, self.group_size)
        attention = self.module.self_attn
        queries, keys = _channels(heads, self.head_dim), _channels(groups, self.head_dim)
        attention.q_proj = select(attention.q_proj, queries, dim=0)
        attention.k_proj = select(attention.k_proj, keys, dim=0)
        attention.v_proj = select(attention.v_proj, keys, dim=0)
        attention.o_proj = select(attention.o_proj, queries, dim=1)
        attention.num_key_value_groups = len(heads) // len(groups)
        # Not every family has these, and what has them may ask for them.
        for name, value in (("num_heads", len(heads)), ("num_key_value_heads", len(groups))):
            if hasattr(attention, name):
                setattr(attention, name, value)

    def keep_neurons(self, neurons: Sequence[int]) -> None:
        """Remove all other FFN neurons.

        Raises:
            InfopruneError: no neuron is left.
        """
        if not neurons:
            raise InfopruneError("a layer of the language model would keep 0 neurons; keep at least 1")
        mlp = self.module.mlp
        mlp.gate_proj = select(mlp.gate_proj, neurons, dim=0)
        mlp.up_proj = select(mlp.up_proj, neurons, dim=0)
        mlp.down_proj = select(mlp.down_proj, neurons, dim=1)


def replace_weights(projection: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a projection other values; the parameters are new ones, because copies of a model share them.

    Raises:
        InfopruneError: another shape, or a bias where there is none.
    """
    for name, value in (("weight", weight), ("bias", bias)):
        old = getattr(projection, name)
        if (old is None) != (value is None) or (value is not None and old.shape != value.shape):
            wanted, found = (None if t is None else list(t.shape) for t in (old, value))
            raise InfopruneError(f"{name} of a language projection is {found}, the layer needs {wanted}")
        if value is not None:
            new = value.detach().to(device=old.device, dtype=old.dtype, copy=True)
            setattr(projection, name, nn.Parameter(new, requires_grad=old.requires_grad))


def check_heads(heads: Sequence[int], group_size: int) -> list[int]:
    """The key-value heads that these query heads attend to, ascending.

    Raises:
        InfopruneError: no head, or not equally many of each.
    """
    counts = Counter(head // group_size for head in heads)
    if len(set(counts.values())) != 1:
        raise InfopruneError(
            f"query heads {list(heads)} of groups of {group_size}: a layer keeps at least one key-value head, and "
            "equally many query heads of each"
        )
    return sorted(counts)


def _channels(heads: Sequence[int], head_dim: int) -> list[int]:
    return [head * head_dim + channel for head in heads for channel in range(head_dim)]


# ── Of a model ───────────────────────────────────────────────────────────────


def language_layers(model: Any) -> list[LanguageLayer]:
    """The decoder layers of a vision-language model, in order.

    Raises:
        InfopruneError: the text model is of another kind, or does not attend fully in every layer.
    """
    text = text_model(model)
    if text.config.model_type not in TEXT_TYPES:
        raise InfopruneError(
            f"text model {text.config.model_type!r}: its layers are not known; language pruning takes "
            f"{', '.join(TEXT_TYPES)}; use language.method: none"
        )
    return [LanguageLayer(layer, layer.self_attn.head_dim) for layer in text.layers]


def knows(model: Any) -> bool:
    """Whether `language_layers` takes this model."""
    try:
        language_layers(model)
    except InfopruneError:
        return False
    return True


def is_pruned(model: Any) -> bool:
    """Whether a layer has fewer heads or neurons than the text model's configuration says."""
    config = text_model(model).config
    full = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    return any((x.num_heads, x.num_key_value_heads, x.num_neurons) != full for x in language_layers(model))
