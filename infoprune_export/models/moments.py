"""Second moments of a tower on calibration data: what every projection reads, and how much the loss minds its output.

For a projection y = W h + b inside a block, C is the covariance of h and G = E[g g^T] the second moment of the loss
gradient g at y. Changing W by dW changes the loss, to second order and with the Fisher matrix's usual factorisation
into inputs and output gradients, by tr(G dW C dW^T). Only C and G are kept, so memory does not depend on the number of
images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.data.samples import Sample
from infoprune_export.models.calibration import Site, TaskLoss, batches, images_per_pass, projection_of
from infoprune_export.models.least_squares import AffineFit
from infoprune_export.models.vlm import VLM


@dataclass(frozen=True)
class Moments:
    """Of one projection, on the CPU, fp32."""

    covariance: Tensor
    """C [p, p] of its input, centred: a constant belongs to the bias."""
    metric: Tensor
    """G [D, D], the mean over tokens of g g^T at its output."""


def collect_moments(
    vlm: VLM,
    samples: Sequence[Sample],
    loss: TaskLoss,
    sites: Sequence[Site],
    *,
    seed: int,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[Site, list[Moments]]:
    """Moments of every block's projection at `sites`, in one forward and backward pass over the samples.

    By default as many images are taken at a time as memory allows, see `images_per_pass`.
    """
    batch_size = batch_size or images_per_pass(vlm, samples)
    watched = {(site, i): _Watched() for site in sites for i in range(len(vlm.tower.blocks))}
    rng = np.random.default_rng([seed, 0])
    with contextlib.ExitStack() as stack:
        for (site, i), one in watched.items():
            projection = projection_of(vlm.tower.blocks[i], site)
            stack.callback(projection.register_forward_hook(one.remember).remove)
        for batch in batches(samples, batch_size):
            loss.probe(vlm, batch, rng).backward()
            for one in watched.values():
                one.accumulate()
            on_batch(len(batch))
    # One block's sums are gone before the next one's matrices are made: together they would be gigabytes.
    return {site: [watched.pop((site, i)).moments() for i in range(len(vlm.tower.blocks))] for site in sites}


class _Watched:
    """Running sums of one projection, fp32: at d_ffn 5120 they are 105 MB a block, and float64 gains nothing that the
    damping of every inverse does not hide.
    """

    def __init__(self) -> None:
        self._fit: AffineFit | None = None
        self._count = 0
        self._inputs: Tensor | None = None
        self._output: Tensor | None = None
        self._metric: Any = 0.0

    def remember(self, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # The weights are frozen: the graph starts where it is first asked to.
        output = output if output.requires_grad else output.requires_grad_()
        output.retain_grad()
        self._inputs, self._output = arguments[0].detach(), output
        return output

    def accumulate(self) -> None:
        if self._inputs is None or self._output is None or self._output.grad is None:
            return  # a constant attention or FFN is not called
        hidden = self._inputs.flatten(0, -2).float()
        gradient = self._output.grad.flatten(0, -2).float()
        self._inputs = self._output = None
        self._fit = self._fit or AffineFit(hidden.shape[1], 0, torch.float32)
        self._fit.update(hidden, hidden[:, :0])
        self._metric = self._metric + gradient.T @ gradient
        self._count += len(gradient)

    def moments(self) -> Moments:
        if self._fit is None:
            return Moments(torch.zeros(0, 0), torch.zeros(0, 0))
        return Moments(self._fit.covariance().cpu(), (self._metric / self._count).cpu())
