"""Importance of heads by the loss's gradient at their gates.

Michel, Levy and Neubig, "Are sixteen heads really better than one?" (2019): I_h = E |dL / dg_h| at gate g_h = 1,
l2-normalised within each block. The absolute value is taken per batch of a few images. Without labels L is the
Gauss-Newton probe of `TaskLoss.probe`, since the distance to the original has no gradient at the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.heads.gates import gated
from infoprune_export.models.calibration import TaskLoss, batches
from infoprune_export.models.vlm import VLM

# Over many images gradients of opposite sign cancel before the absolute value is taken.
_IMAGES = 4


def michel(
    vlm: VLM,
    samples: Sequence[Sample],
    loss: TaskLoss,
    *,
    mask: Tensor | None = None,
    seed: int = 0,
    advance: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Importance [L, H], float64, of the heads that `mask` (bool [L, H]) leaves open; 0 for closed ones."""
    counts = vlm.tower.head_counts()
    if mask is None:
        mask = torch.ones(len(counts), counts[0], dtype=torch.bool)
    gates = mask.float().to(vlm.device).requires_grad_()
    importance = torch.zeros(mask.shape, dtype=torch.float64)
    rng = np.random.default_rng([seed, 0])
    for batch in batches(samples, _IMAGES):
        with gated(vlm.tower, list(gates)):
            (slope,) = torch.autograd.grad(loss.probe(vlm, batch, rng), gates)
        importance += slope.abs().double().cpu() * mask * len(batch) / len(samples)
        advance(len(batch) / len(samples))
    norms = importance.norm(dim=1, keepdim=True)
    return importance / norms.clamp_min(torch.finfo(torch.float64).tiny)


def michel_iterative(
    vlm: VLM,
    samples: Sequence[Sample],
    loss: TaskLoss,
    *,
    rounds: int,
    seed: int = 0,
    advance: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """Order of removal [L, H], float64: 0 for the first head to go, L H - 1 for the last.

    In each of `rounds` an equal number of heads goes, the least important of all blocks, and the importance of the
    rest is measured again without them. So the order holds for every budget.
    """
    counts = vlm.tower.head_counts()
    mask = torch.ones(len(counts), counts[0], dtype=torch.bool)
    per_round = math.ceil(mask.numel() / rounds)
    passes = math.ceil(mask.numel() / per_round)
    order = torch.zeros(mask.numel(), dtype=torch.float64)
    gone = 0
    while mask.any():
        importance = michel(
            vlm, samples, loss, mask=mask, seed=seed, advance=lambda share: advance(share / passes)
        ).flatten()
        importance[~mask.flatten()] = torch.inf
        # Of equal heads the last goes first, as in a plan.
        ranked = importance.flip(0).argsort(stable=True)[: min(per_round, int(mask.sum()))]
        leaving = mask.numel() - 1 - ranked
        order[leaving] = torch.arange(gone, gone + len(leaving), dtype=torch.float64)
        mask.view(-1)[leaving] = False
        gone += len(leaving)
    return order.view(mask.shape)
