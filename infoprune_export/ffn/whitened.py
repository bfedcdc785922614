"""Whitened SVD of every projection, the activation kept.

Each W [out, in] becomes B A of rank k with least ``E |(W - B A) (h - mean)|^2``: the SVD of W C^1/2, C being the
covariance of its input h (SVD-LLM, whose second version takes the eigen square root as here; the first takes
Cholesky's, which fails on a singular C). Unlike there C is centred, because a bias takes the mean. One fraction of the
multiply-accumulates for every matrix, as there: k (in + out) = keep_macs in out.

With a refit the down projection is first fitted to the original's residual stream, behind the factored input
projections, and then truncated in the metric of its input: reduced-rank regression on the neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infoprune_export.ffn.budget import factor_rank
from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.lowrank import truncate
from infoprune_export.ffn.observe import DAMPING, Observer, regress
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.models.block import Block
from infoprune_export.rewrite.surgery import FFN_OUT, assign, reshape_ffn


def compress_whitened(job: FfnJob) -> Compressed:
    """Factor every FFN of `pruned` in place; see `FfnJob`. With ``keep_macs: 1`` nothing is done."""
    blocks = job.pruned.tower.blocks
    if job.spec.keep_macs == 1:
        return FfnPlan.full([block.ffn_shape.size for block in blocks]), {}
    choices = []
    for block in blocks:
        ranks = (factor_rank(block, job.spec),) * len(block.ffn_projections)
        choices.append(FfnChoice("factored", tuple(range(block.ffn_shape.size)), ranks=ranks))
    plan = FfnPlan.for_blocks(blocks, choices)
    observer = Observer(job.original, job.samples, to_original=job.ridge is not None)
    weights: dict[str, Tensor] = {}
    for i, (before, after, choice) in enumerate(zip(job.original.tower.blocks, blocks, choices, strict=True)):
        weights |= assign(job.pruned.tower, observer.refit_attention(i, before, after, job.ridge))
        parts = factor_block(observer, before, after, choice.ranks[0], job.ridge)
        reshape_ffn(after, choice)
        weights |= assign(job.pruned.tower, {f"{i}.{name}": value for name, value in parts.items()})
        observer.streams.advance(before, after)
        job.on_block(i)
    return plan, weights


@torch.no_grad()
def factor_block(observer: Observer, before: Block, after: Block, rank: int, ridge: float | None) -> dict[str, Tensor]:
    """Factors of an mlp's projections by role, float64, with their biases. `after` is left with their dense products.

    Without `ridge` the down projection is truncated as it is.
    """
    parts: dict[str, Tensor] = {}

    def factor(role: str, weight: Tensor, bias: Tensor, covariance: Tensor, mean: Tensor) -> None:
        layer = after.ffn_projections[role]
        down, up, _ = truncate(weight, covariance, rank)
        product = down @ up
        parts[f"{role}.weight"], parts[f"{role}_factor.weight"] = down, up
        parts[f"{role}.bias"] = bias + (weight - product) @ mean
        layer.weight.copy_(product)
        layer.bias.copy_(parts[f"{role}.bias"])

    features, neurons = after.ffn_out.out_features, after.ffn_out.in_features
    seen = observer.watch(before, after)
    read = regress(((one.inputs, one.inputs[:, :0]) for one in seen), features, 0)
    for role, layer in after.ffn_projections.items():
        if role != FFN_OUT:
            factor(role, layer.weight.double().cpu(), layer.bias.double().cpu(), read.covariance, read.mean)
    # Now behind factored input projections; with a refit `wanted` differs from `output`.
    rest = ((hidden, one.wanted - one.output) for hidden, one in observer.hidden(before, after))
    fit = regress(rest, neurons, features, ridge or DAMPING)
    out = after.ffn_out
    weight, bias = out.weight.double().cpu() + fit.weight, out.bias.double().cpu() + fit.bias
    factor(FFN_OUT, weight, bias, fit.covariance, fit.mean)
    return parts
