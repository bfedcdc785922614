"""Reduced-rank regression: the linear map of some rank that comes nearest to the FFN's output on calibration data.

A is the least-squares map of the output on the input x with covariance C; the best of rank k is U_k U_k^T A, U_k the
leading eigenvectors of A C A^T (Izenman 1975). No linear map of that rank has a smaller mean squared error there.
"""

from __future__ import annotations

from torch import Tensor

from infoprune_export.ffn.budget import linear_rank
from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.lowrank import truncate
from infoprune_export.ffn.observe import Observer, damped, regress
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.rewrite.surgery import FFN_IN, FFN_OUT, assign


def compress_rrr(job: FfnJob) -> Compressed:
    """One fraction of the multiply-accumulates for all blocks, `keep_macs`; see `FfnJob` for the rest.

    The target is the original's residual stream, or without a refit what the block's own FFN computes; `ridge` does
    not enter otherwise, see `observe.DAMPING`.
    """
    blocks = job.pruned.tower.blocks
    plan = FfnPlan.for_blocks(blocks, [FfnChoice("linear", rank=linear_rank(block, job.spec)) for block in blocks])
    observer = Observer(job.original, job.samples, to_original=job.ridge is not None)
    weights: dict[str, Tensor] = {}
    for i, (before, after) in enumerate(zip(job.original.tower.blocks, blocks, strict=True)):
        weights |= assign(job.pruned.tower, observer.refit_attention(i, before, after, job.ridge))
        rank, seen = plan.choices[i].rank, observer.watch(before, after)
        fit = regress(((one.inputs, one.wanted) for one in seen), plan.features, plan.features)
        down, up, _ = truncate(fit.weight, damped(fit.covariance), rank)
        parts = {f"{FFN_IN}.weight": up, f"{FFN_OUT}.weight": down, f"{FFN_OUT}.bias": fit.bias_of(down @ up)}
        after.make_ffn_linear(rank)
        weights |= assign(job.pruned.tower, {f"{i}.{name}": value for name, value in parts.items()})
        observer.streams.advance(before, after)
        job.on_block(i)
    return plan, weights
