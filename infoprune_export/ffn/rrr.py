"""Reduced-rank regression: the linear map of some rank that comes nearest to the FFN's output on calibration data.

A is the least-squares map of the output on the input x with covariance C; the best of rank k is U_k U_k^T A, U_k the
leading eigenvectors of A C A^T (Izenman 1975). No linear map of that rank has a smaller mean squared error there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from infoprune_export.data.vqa import Sample
from infoprune_export.ffn.budget import linear_rank
from infoprune_export.ffn.lowrank import truncate
from infoprune_export.ffn.observe import Observer, damped, regress
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import FfnSpec
from infoprune_export.rewrite.surgery import FFN_IN, FFN_OUT, assign


def compress_rrr(
    original: VLM,
    pruned: VLM,
    samples: Sequence[Sample],
    loss: TaskLoss,
    spec: FfnSpec,
    *,
    ridge: float | None,
    seed: int,
    on_block: Callable[[int], None] = lambda block: None,
) -> tuple[FfnPlan, dict[str, Tensor]]:
    """One fraction of the multiply-accumulates for all blocks, `keep_macs`; see `compress_ffn` for the rest.

    The target is the original's residual stream, or without a refit what the block's own FFN computes; `ridge` does
    not enter otherwise, see `observe.DAMPING`.
    """
    blocks = pruned.tower.blocks
    plan = FfnPlan.for_blocks(blocks, [FfnChoice("linear", rank=linear_rank(block, spec)) for block in blocks])
    observer = Observer(original, samples, to_original=ridge is not None)
    weights: dict[str, Tensor] = {}
    for i, (before, after) in enumerate(zip(original.tower.blocks, blocks, strict=True)):
        weights |= assign(pruned.tower, observer.refit_attention(i, before, after, ridge))
        rank, seen = plan.choices[i].rank, observer.watch(before, after)
        fit = regress(((one.inputs, one.wanted) for one in seen), plan.features, plan.features)
        down, up, _ = truncate(fit.weight, damped(fit.covariance), rank)
        parts = {f"{FFN_IN}.weight": up, f"{FFN_OUT}.weight": down, f"{FFN_OUT}.bias": fit.bias_of(down @ up)}
        after.make_ffn_linear(rank)
        weights |= assign(pruned.tower, {f"{i}.{name}": value for name, value in parts.items()})
        observer.streams.advance(before, after)
        on_block(i)
    return plan, weights
