"""What the language model's attention works on, shown while it runs.

Transformers asks a registry for a text model's attention by the name in its configuration. For as long as something is
watched, that name is one of ours, whose attention is the native one and shows its inputs first. No kernel is changed,
and nobody computes the Q x K matrix who needs a few of its rows.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "infoprune_"
_NATIVE = ("sdpa", "eager")

Watcher = Callable[[Tensor, Tensor, Tensor | None, float], None]
"""Called with query [B, H, Q, d] and key [B, H_kv, K, d], both rotated, mask (bool, additive or None) and scaling."""

_watchers: weakref.WeakKeyDictionary[nn.Module, Watcher] = weakref.WeakKeyDictionary()


def _attend(native: str, module: nn.Module, query: Tensor, key: Tensor, *arguments: Any, **named: Any) -> Any:
    """The native attention, after showing its inputs to the module's watcher."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if (watcher := _watchers.get(module)) is not None:
        mask = arguments[1] if len(arguments) > 1 else named["attention_mask"]
        scaling = named.get("scaling")
        watcher(query, key, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    # Every modelling file has an eager attention of its own, which is in no registry.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(native, eager)(module, query, key, *arguments, **named)


@contextlib.contextmanager
def watched(text: Any, watchers: Mapping[int, Watcher]) -> Iterator[None]:
    """Within the block, these layers of a text model show their attention's inputs.

    Raises:
        InfopruneError: the text model's attention is neither SDPA nor eager, or is being watched already.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    native = text.config._attn_implementation
    if str(native).startswith(_PREFIX):
        raise InfopruneError("this model's language model is being pruned already; leave the outer block first")
    if native not in _NATIVE:
        raise InfopruneError(
            f"attention implementation {native!r}: token pruning reads attention from {' or '.join(_NATIVE)}; load "
            "the model with attn_implementation='sdpa'"
        )
    AttentionInterface.register(_PREFIX + native, functools.partial(_attend, native))
    AttentionMaskInterface.register(_PREFIX + native, ALL_MASK_ATTENTION_FUNCTIONS[native])
    modules = {text.layers[number].self_attn: watcher for number, watcher in watchers.items()}
    _watchers.update(modules)
    text.config._attn_implementation = _PREFIX + native
    try:
        yield
    finally:
        text.config._attn_implementation = native
        for module in modules:
            del _watchers[module]


def attention_rows(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, rows: Tensor) -> Tensor:
    """Softmax attention of some queries, head mean, fp32 [B, R, K], without the rest of the Q x K matrix.

    Args:
        query: [B, H, Q, d], any floating dtype.
        key: [B, H_kv, K, d]; H is a multiple of H_kv.
        mask: [B or 1, 1, Q, K], bool (True attends) or additive; None is causal.
        scaling: of the products.
        rows: int64 [B, R] indices of queries.
    """
    batch, heads, _, width = query.shape
    index = rows[:, None, :, None].expand(-1, heads, -1, width)
    asked = query.gather(2, index).float().unflatten(1, (key.shape[1], -1))
    logits = (asked @ key.float()[:, :, None].transpose(-1, -2)).flatten(1, 2) * scaling
    if mask is None:
        allowed = torch.arange(key.shape[2], device=key.device) <= rows[..., None]
    else:
        mask = mask[:, 0].expand(batch, -1, -1).gather(1, rows[..., None].expand(-1, -1, mask.shape[-1]))
        allowed = mask if mask.dtype == torch.bool else mask >= 0
    return logits.masked_fill(~allowed[:, None], torch.finfo(logits.dtype).min).softmax(-1).mean(1)


def text_model(model: PreTrainedModel) -> Any:
    """The stack of decoder layers behind a vision-language model's embeddings.

    Raises:
        InfopruneError: there is none, or its layers do not all attend to everything before them.
    """
    text = getattr(getattr(model, "model", None), "language_model", None)
    if text is None or not hasattr(text, "layers"):
        raise InfopruneError(
            f"{type(model).__name__} has no model.language_model.layers to prune tokens in; use decoder.method: none"
        )
    other = set(getattr(text.config, "layer_types", None) or ()) - {"full_attention"}
    if other:
        raise InfopruneError(
            f"the language model has layers of {', '.join(sorted(other))}: tokens are pruned under full attention "
            "only; use decoder.method: none"
        )
    return text
