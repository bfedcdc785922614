"""Carry a choice of neurons out: remove the others block by block and refit what is left to the original model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.models.streams import Streams
from infoprune_export.rewrite.surgery import ATTENTION_OUT, FFN_OUT


def remove_neurons(job: FfnJob, kept: Sequence[Sequence[int]]) -> Compressed:
    """Keep neurons ``kept[l]`` (ascending) of every block of the job's tower, in place.

    With a ridge every down projection, and the attention's output projection in front of it, is refitted to the
    original's residual stream behind its already refitted predecessors.
    """
    blocks = job.pruned.tower.blocks
    plan = FfnPlan.for_blocks(blocks, [FfnChoice("mlp", tuple(neurons)) for neurons in kept])
    for block, neurons in zip(blocks, kept, strict=True):
        if len(neurons) < block.ffn_shape.size:
            block.keep_neurons(neurons)
    weights: dict[str, Tensor] = {}
    if job.ridge is None:
        return plan, weights
    streams = Streams(job.original, job.samples)
    for i, (before, after) in enumerate(zip(job.original.tower.blocks, blocks, strict=True)):
        weight, bias = streams.refit("attention", before, after, job.ridge)
        after.set_attention_out(weight, bias)
        weights[f"{i}.{ATTENTION_OUT}.weight"], weights[f"{i}.{ATTENTION_OUT}.bias"] = weight, bias
        weight, bias = streams.refit("ffn", before, after, job.ridge)
        after.set_ffn_out(weight, bias)
        weights[f"{i}.{FFN_OUT}.weight"], weights[f"{i}.{FFN_OUT}.bias"] = weight, bias
        streams.advance(before, after)
        job.on_block(i)
    return plan, weights
