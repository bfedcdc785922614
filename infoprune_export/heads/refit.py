"""Refit the output projections of a tower whose heads were removed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from infoprune_export.data.vqa import Sample
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.calibration import Streams, embed_all
from infoprune_export.models.vlm import VLM
from infoprune_export.rewrite.surgery import ATTENTION_OUT, apply_heads


def refit_heads(
    original: VLM, pruned: VLM, plan: HeadPlan, samples: Sequence[Sample], ridge: float
) -> dict[str, Tensor]:
    """Remove `plan`'s heads from `pruned`, an untouched copy of `original`, and refit every output projection.

    `pruned` is changed in place. Blocks are taken in order, each fitted behind its already refitted predecessors.
    Returns the new projections under `surgery`'s names.
    """
    apply_heads(pruned.tower, plan, {})
    streams = Streams(embed_all(original, samples), original.device)
    weights: dict[str, Tensor] = {}
    for i, (before, after) in enumerate(zip(original.tower.blocks, pruned.tower.blocks, strict=True)):
        weight, bias = streams.refit("attention", before, after, ridge)
        after.set_attention_out(weight, bias)
        weights[f"{i}.{ATTENTION_OUT}.weight"], weights[f"{i}.{ATTENTION_OUT}.bias"] = weight, bias
        streams.advance(before, after)
    return weights
