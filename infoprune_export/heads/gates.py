"""Sigmoid gates on attention heads and the objective that trains them (paper A, section 4.1).

A gate g = sigmoid(zeta[l, h]) multiplies head h's channels of the concatenated attention output of block l, before the
output projection. All weights are frozen. The spectral terms need no forward pass: the Gram C of a block's
concatenated heads is constant, and gating it gives D C D with D = diag(g).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from infoprune_export.analysis.spectra import effective_rank, ks_distance, singular_values, spectral_wasserstein
from infoprune_export.data.vqa import Sample
from infoprune_export.models.calibration import batches, captured_input, inputs_of
from infoprune_export.models.tower import VisionTower
from infoprune_export.models.vlm import VLM


@contextlib.contextmanager
def gated(tower: VisionTower, gates: Sequence[Tensor]) -> Iterator[None]:
    """Multiply every head's output by its gate; ``gates[l]`` is [num_heads] and may require gradients."""
    handles = []
    for block, gate in zip(tower.blocks, gates, strict=True):

        def scale(
            _: nn.Module, arguments: tuple[Tensor], gate: Tensor = gate, width: int = block.head_dim
        ) -> tuple[Tensor]:
            return (arguments[0] * gate.repeat_interleave(width).to(arguments[0].dtype),)

        if block.num_heads:
            handles.append(block.attention_out.register_forward_pre_hook(scale))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def head_grams(vlm: VLM, samples: Sequence[Sample], batch_size: int = 32) -> list[Tensor]:
    """Per block the mean Gram of the concatenated head outputs over all tokens, float64 [H head_dim, H head_dim]."""
    grams = [torch.zeros(0)] * len(vlm.tower.blocks)
    tokens = 0
    with contextlib.ExitStack() as stack:
        inputs = [stack.enter_context(captured_input(block.attention_out)) for block in vlm.tower.blocks]
        for batch in batches(samples, batch_size):
            vlm.tower.features_of(inputs_of(vlm, batch))
            for i, last_input in enumerate(inputs):
                z = last_input().flatten(0, -2).double().cpu()
                grams[i] = z.T @ z if not tokens else grams[i] + z.T @ z
            tokens += len(z)
    return [gram / tokens for gram in grams]


class SpectralTerms:
    """eRank and spectral-distance terms of all blocks, from their constant Grams."""

    def __init__(
        self, grams: Sequence[Tensor], head_dims: Sequence[int], distance: Literal["ks", "wasserstein"]
    ) -> None:
        self._grams = list(grams)
        self._head_dims = list(head_dims)
        self._distance = ks_distance if distance == "ks" else spectral_wasserstein
        self._spectra = [singular_values(gram) for gram in self._grams]
        self._ranks = [effective_rank(sigma) for sigma in self._spectra]

    def __call__(self, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Means over blocks of eRank(Z_S) - eRank(Z) (equation 5) and of the distance of spectra (equation 6)."""
        rank = torch.zeros((), dtype=torch.float64)
        distance = torch.zeros((), dtype=torch.float64)
        for i, gate in enumerate(gates):
            scale = gate.double().cpu().repeat_interleave(self._head_dims[i])
            sigma = singular_values(scale[:, None] * self._grams[i] * scale)
            rank = rank + (effective_rank(sigma) - self._ranks[i])
            distance = distance + self._distance(sigma, self._spectra[i])
        return rank / len(self._grams), distance / len(self._grams)
