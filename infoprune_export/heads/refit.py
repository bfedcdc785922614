"""Refit a tower whose heads were removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.streams import Streams
from infoprune_export.models.vlm import VLM
from infoprune_export.rewrite.surgery import ATTENTION_OUT, FFN_OUT, apply_heads


def refit_heads(
    original: VLM,
    pruned: VLM,
    plan: HeadPlan,
    samples: Sequence[Sample],
    ridge: float,
    on_block: Callable[[int], None] = lambda block: None,
) -> dict[str, Tensor]:
    """Remove `plan`'s heads from `pruned`, an untouched copy of `original`, and refit its output projections.

    The down projection behind each attention is refitted too: it reads other inputs, so it makes good a part that the
    heads left over cannot. `pruned` is changed in place. Blocks are taken in order, each fitted behind its already
    refitted predecessors. Returns the new projections under `surgery`'s names.
    """
    apply_heads(pruned.tower, plan, {})
    streams = Streams(original, samples)
    weights: dict[str, Tensor] = {}
    for i, (before, after) in enumerate(zip(original.tower.blocks, pruned.tower.blocks, strict=True)):
        weight, bias = streams.refit("attention", before, after, ridge)
        after.set_attention_out(weight, bias)
        weights[f"{i}.{ATTENTION_OUT}.weight"], weights[f"{i}.{ATTENTION_OUT}.bias"] = weight, bias
        weight, bias = streams.refit("ffn", before, after, ridge)
        after.set_ffn_out(weight, bias)
        weights[f"{i}.{FFN_OUT}.weight"], weights[f"{i}.{FFN_OUT}.bias"] = weight, bias
        streams.advance(before, after)
        on_block(i)
    return weights
