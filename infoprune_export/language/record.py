"""The structure record of a pruned language model in a checkpoint's ``config.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infoprune_export.errors import InfopruneError
from infoprune_export.language.plan import sizes_of
from infoprune_export.models.language import LanguageLayer, is_pruned, knows, language_layers

Record = list[dict[str, int]]


def language_record(model: Any) -> Record | None:
    """Heads, key-value heads, head_dim and neurons of every decoder layer; None for a whole language model."""
    if not knows(model) or not is_pruned(model):
        return None
    layers = language_layers(model)
    return [
        {
            "num_heads": size.heads,
            "num_key_value_heads": size.key_value_heads,
            "head_dim": layer.head_dim,
            "neurons": size.neurons,
        }
        for layer, size in zip(layers, sizes_of(layers), strict=True)
    ]


def shape_language_like(layers: Sequence[LanguageLayer], record: Any) -> None:
    """Give whole layers the recorded shapes, in place; what is kept does not matter before weights are read.

    Raises:
        InfopruneError: the record does not fit the layers.
    """
    if not isinstance(record, list) or len(record) != len(layers):
        found = len(record) if isinstance(record, list) else repr(record)
        raise InfopruneError(f"config.json records {found} pruned language layers, the model has {len(layers)}")
    for number, (layer, entry) in enumerate(zip(layers, record, strict=True)):
        try:
            heads, groups = entry["num_heads"], entry["num_key_value_heads"]
            head_dim, neurons = entry["head_dim"], entry["neurons"]
        except (KeyError, TypeError):
            raise InfopruneError(f"config.json, language layer {number}: {entry} records no structure") from None
        whole = all(type(value) is int for value in (heads, groups, neurons)) and head_dim == layer.head_dim
        fits = whole and groups in range(1, layer.num_key_value_heads + 1) and not heads % groups
        if not fits or heads // groups not in range(1, layer.group_size + 1):
            raise InfopruneError(
                f"config.json, language layer {number}: {heads} query heads over {groups} key-value heads of "
                f"{head_dim} do not fit the language model"
            )
        if neurons not in range(1, layer.num_neurons + 1):
            raise InfopruneError(
                f"config.json, language layer {number}: {neurons} neurons do not fit the {layer.num_neurons} there are"
            )
        if heads < layer.num_heads:
            size = layer.group_size
            layer.keep_heads([g * size + query for g in range(groups) for query in range(heads // groups)])
        if neurons < layer.num_neurons:
            layer.keep_neurons(range(neurons))
