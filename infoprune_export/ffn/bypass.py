"""Neurons by optimal brain surgeon, and a linear path of small rank around the activation for what they cannot carry.

The path costs 2 D r multiply-accumulates a block (D -> r in, r -> D out), which are taken off the neurons' budget. It
is the best one beside the kept neurons h: of the least-squares map of the residual on [h, x] the part on x, truncated
in the metric of what h does not explain of x, the Schur complement C_xx - C_xh C_hh^-1 C_hx (partial reduced-rank
regression). Then down projection and path are fitted together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.lowrank import truncate
from infoprune_export.ffn.obs import compress_obs
from infoprune_export.ffn.observe import Observer, Regression, damped, regress
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.models.block import Block
from infoprune_export.models.vlm import writable_copy
from infoprune_export.recipe import FfnSpec
from infoprune_export.rewrite.surgery import FFN_BYPASS, FFN_IN, FFN_OUT, assign, reshape_ffn


def neuron_budget(blocks: Sequence[Block], spec: FfnSpec) -> float:
    """Fraction of all FFN multiply-accumulates that is left for neurons.

    Raises:
        InfopruneError: the bypass is larger than the budget, or of more than D channels.
    """
    features = blocks[0].ffn_out.out_features
    full = sum(len(block.ffn_projections) * block.ffn_shape.size for block in blocks)
    paths = 2 * len(blocks)
    left = spec.keep_macs - paths * spec.bypass_rank / full
    most = min(features, int((spec.keep_macs * full - spec.round_to * len(blocks[0].ffn_projections)) / paths))
    if spec.bypass_rank > most:
        raise InfopruneError(
            f"ffn.bypass_rank = {spec.bypass_rank} is too large: with ffn.keep_macs = {spec.keep_macs:g}, "
            f"ffn.round_to = {spec.round_to} and {features} features at most {max(most, 0)}; lower it or keep more"
        )
    return left


def compress_bypass(job: FfnJob) -> Compressed:
    """Neurons as ``obs`` chooses them under what the bypasses leave, in place; see `FfnJob`.

    Without `ridge` kept neurons stay as they are and the bypass is fitted to the part of the removed ones. A block that
    loses all neurons becomes its bypass alone, one that keeps all gets none. With ``keep_macs: 1`` nothing is done.
    """
    blocks = job.pruned.tower.blocks
    if job.spec.keep_macs == 1:
        return FfnPlan.full([block.ffn_shape.size for block in blocks]), {}
    narrower = job.spec.model_copy(update={"keep_macs": neuron_budget(blocks, job.spec)})
    chosen, _ = compress_obs(replace(job, pruned=writable_copy(job.pruned), spec=narrower, ridge=None))
    rank = job.spec.bypass_rank
    choices = [_choice(choice, width, rank) for choice, width in zip(chosen.choices, chosen.widths, strict=True)]
    plan = FfnPlan.for_blocks(blocks, choices)
    observer = Observer(job.original, job.samples, to_original=job.ridge is not None)
    weights: dict[str, Tensor] = {}
    for i, (before, after, choice) in enumerate(zip(job.original.tower.blocks, blocks, choices, strict=True)):
        weights |= assign(job.pruned.tower, observer.refit_attention(i, before, after, job.ridge))
        parts = fit_block(observer, before, after, choice, job.ridge)
        weights |= assign(job.pruned.tower, {f"{i}.{name}": value for name, value in parts.items()})
        if job.ridge is not None and choice.kind != "linear":
            weight, bias = observer.streams.refit("ffn", before, after, job.ridge)
            weights |= assign(job.pruned.tower, {f"{i}.{FFN_OUT}.weight": weight, f"{i}.{FFN_OUT}.bias": bias})
        observer.streams.advance(before, after)
        job.on_block(i)
    return plan, weights


def _choice(choice: FfnChoice, width: int, rank: int) -> FfnChoice:
    if not choice.neurons:
        return FfnChoice("linear", rank=rank)
    return choice if choice.size == width else FfnChoice("bypass", choice.neurons, rank=rank)


@torch.no_grad()
def fit_block(
    observer: Observer, before: Block, after: Block, choice: FfnChoice, ridge: float | None
) -> dict[str, Tensor]:
    """Reshape `after` as chosen and return the parts of its FFN that are new, by role, float64."""
    features, kept = after.ffn_out.out_features, torch.tensor(choice.neurons, dtype=torch.long)
    if choice.kind == "mlp":
        return {}
    out = after.ffn_out
    weight, bias = out.weight[:, kept].double().cpu(), out.bias.double().cpu()

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        # Beside the neurons with a refit; without one these are fixed, and what they leave is fitted on x alone.
        for hidden, one in observer.hidden(before, after):
            mine = hidden[:, kept]
            rest = one.wanted - mine @ weight.T.to(mine) - bias.to(mine)
            yield (torch.cat((mine, one.inputs), dim=1) if beside else one.inputs), rest

    beside = len(choice.neurons) if ridge is not None else 0
    fit = regress(rows(), beside + features, features)
    path, metric = _partial(fit, beside)
    down, up, _ = truncate(path, metric, choice.rank)
    reshape_ffn(after, choice)
    if choice.kind == "linear":
        return {f"{FFN_IN}.weight": up, f"{FFN_OUT}.weight": down, f"{FFN_OUT}.bias": bias + fit.bias_of(down @ up)}
    offset = bias if beside else bias + fit.bias_of(down @ up)
    return {
        f"{FFN_BYPASS}.weight": up,
        f"{FFN_OUT}.weight": torch.cat((weight, down), dim=1),
        f"{FFN_OUT}.bias": offset,
    }


def _partial(fit: Regression, beside: int) -> tuple[Tensor, Tensor]:
    """The part [q, p - beside] of a regression's map on its last inputs, and their covariance given the first ones."""
    covariance = damped(fit.covariance)
    first, cross, last = covariance[:beside, :beside], covariance[:beside, beside:], covariance[beside:, beside:]
    return fit.weight[:, beside:], last - cross.T @ torch.linalg.solve(first, cross) if beside else last
