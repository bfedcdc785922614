"""Carry a choice of neurons out: remove the others block by block and refit what is left to the original model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from infoprune_export.data.vqa import Sample
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.models.calibration import Streams, embed_all
from infoprune_export.models.vlm import VLM
from infoprune_export.rewrite.surgery import FFN_OUT


def remove_neurons(
    original: VLM,
    pruned: VLM,
    kept: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    *,
    ridge: float | None,
    on_block: Callable[[int], None] = lambda block: None,
) -> tuple[FfnPlan, dict[str, Tensor]]:
    """Keep neurons ``kept[l]`` (ascending) of every block of `pruned`, in place.

    Unless `ridge` is None every down projection is refitted to `original`'s residual stream behind its already refitted
    predecessors. Returns the plan and the refitted projections under `surgery`'s names.
    """
    blocks = pruned.tower.blocks
    full = tuple(block.ffn_shape.size for block in blocks)
    plan = FfnPlan(full, tuple(FfnChoice("mlp", tuple(neurons)) for neurons in kept))
    for block, neurons, width in zip(blocks, kept, full, strict=True):
        if len(neurons) < width:
            block.keep_neurons(neurons)
    weights: dict[str, Tensor] = {}
    if ridge is None:
        return plan, weights
    streams = Streams(embed_all(original, samples), original.device)
    for i, (before, after) in enumerate(zip(original.tower.blocks, blocks, strict=True)):
        weight, bias = streams.refit("ffn", before, after, ridge)
        after.set_ffn_out(weight, bias)
        weights[f"{i}.{FFN_OUT}.weight"], weights[f"{i}.{FFN_OUT}.bias"] = weight, bias
        streams.advance(before, after)
        on_block(i)
    return plan, weights
