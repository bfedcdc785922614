"""The spectral terms of the gates' objective (paper A, equations 5 and 6), from constant Gram matrices.

They need no forward pass: with the weights frozen, the Gram C of a block's concatenated heads is constant, and gating
it gives D C D with D = diag(g). One eigenvalue problem of the tower's width per block remains, and `RollingSpectra`
spreads those over the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from infoprune_export.analysis.spectra import effective_rank, ks_distance, singular_values, spectral_wasserstein


class SpectralTerms:
    """eRank and spectral-distance terms of all blocks.

    Args:
        grams: float64 [H head_dim, H head_dim] per block, on the device that computes.
        head_dims: per block.
        distance: which distance of spectra; None leaves it out.
        rank: whether the effective rank is computed.
    """

    def __init__(
        self,
        grams: Sequence[Tensor],
        head_dims: Sequence[int],
        distance: Literal["ks", "wasserstein"] | None,
        *,
        rank: bool = True,
    ) -> None:
        self.has_gradient = rank or distance == "wasserstein"
        self._grams = list(grams)
        self._head_dims = list(head_dims)
        self._distance = {None: None, "ks": ks_distance, "wasserstein": spectral_wasserstein}[distance]
        self._spectra = [singular_values(gram) for gram in self._grams]
        self._ranks = [effective_rank(sigma) for sigma in self._spectra] if rank else None

    def of_block(self, block: int, gate: Tensor) -> tuple[Tensor, Tensor]:
        """ERank(Z_S) - eRank(Z) (equation 5) and the distance of spectra (equation 6) under gates [H].

        Scalars, float64; what is left out is zero.
        """
        gram = self._grams[block]
        scale = gate.to(gram).repeat_interleave(self._head_dims[block])
        sigma = singular_values(scale[:, None] * gram * scale)
        nothing = torch.zeros((), dtype=torch.float64, device=gram.device)
        rank = nothing if self._ranks is None else effective_rank(sigma) - self._ranks[block]
        distance = nothing if self._distance is None else self._distance(sigma, self._spectra[block])
        return rank, distance

    def __call__(self, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Means of both terms over blocks; ``gates[l]`` is [H]."""
        terms = [self.of_block(block, gate) for block, gate in enumerate(gates)]
        rank, distance = (torch.stack(term).mean() for term in zip(*terms, strict=True))
        return rank, distance


class RollingSpectra:
    """Values and gradients of both terms, a few blocks' computed anew at every step, in turn.

    The first step computes all of them. A block that is not on keeps the gradient of its last turn: gates move by about
    the learning rate per step, so after ``L / per_step`` steps it is hardly out of date. (Drawing blocks and scaling
    their gradient up would be unbiased, but AdamW divides by a root mean square that such spikes inflate.)

    `gradient` is that of ``beta rank + gamma distance`` by the gates, float64 [L, H], before the mean over blocks;
    `values` are both terms, float64 [L, 2].
    """

    def __init__(self, terms: SpectralTerms, shape: tuple[int, int], per_step: int, beta: float, gamma: float) -> None:
        self.gradient = torch.zeros(shape, dtype=torch.float64)
        self.values = torch.zeros(shape[0], 2, dtype=torch.float64)
        self._terms = terms
        self._per_step = per_step
        self._weights = (beta, gamma)

    def refresh(
        self, gates: Tensor, step: int, share: tuple[int, int], reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the blocks of this step under gates [L, H], shared out over processes, and sum with `reduce`.

        Returns what to add to the loss, a scalar whose gradient is the terms', and both terms' means over blocks [2].
        """
        device, blocks = gates.device, len(gates)
        turn = self._turn(step, blocks)
        index, count = share
        # What is kept counts once among the processes.
        kept = torch.full((blocks, 1), float(index == 0), dtype=torch.float64, device=device)
        kept[turn] = 0.0
        gradient, values = kept * self.gradient.to(device), kept * self.values.to(device)
        for block in turn[index::count]:
            gradient[block], values[block] = self._of_block(block, gates[block])
        self.gradient, self.values = reduce(gradient), reduce(values)
        return (self.gradient.to(gates) * gates).sum() / blocks, self.values.mean(0)

    def _turn(self, step: int, blocks: int) -> list[int]:
        if step == 0 or self._per_step >= blocks:
            return list(range(blocks))
        return [(step * self._per_step + i) % blocks for i in range(self._per_step)]

    def _of_block(self, block: int, gate: Tensor) -> tuple[Tensor, Tensor]:
        gate = gate.detach().requires_grad_(self._terms.has_gradient)
        rank, distance = self._terms.of_block(block, gate)
        beta, gamma = self._weights
        slope = torch.zeros_like(gate)
        if self._terms.has_gradient:
            (slope,) = torch.autograd.grad(beta * rank + gamma * distance, gate)
        return slope.double(), torch.stack([rank, distance]).detach()
