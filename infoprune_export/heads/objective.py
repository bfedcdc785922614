"""What gates are trained on: the paper's objective with every term switchable (paper A, equation 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from infoprune_export.heads.spectral import RollingSpectra
from infoprune_export.recipe import HeadsSpec

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Place:
    """Where in training a step is, and which of several processes computes it."""

    step: int
    steps: int
    share: tuple[int, int] = (0, 1)
    """This process and their number."""
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """Sums a tensor over all processes."""


class Gates(Protocol):
    """Trained gates [L, H] of one kind."""

    trained: dict[str, Tensor]
    """Leaves that the optimizer moves."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for AdamW; ``scale`` multiplies the learning rate."""

    def draw(self, rng: np.random.Generator) -> Tensor:
        """Gates [L, H] for one step, differentiable in `trained`."""

    def regularise(self, gates: Tensor, place: Place) -> tuple[Tensor, dict[str, float]]:
        """This process's part of everything but the task loss, and the terms of all processes by name.

        They are ``sparsity``, ``erank`` and ``distance``; one that is switched off is 0 and was not computed.
        """

    def gates(self) -> Tensor:
        """The gates [L, H] in [0, 1] without noise, detached."""

    def scores(self) -> Tensor:
        """What heads are ranked by [L, H], larger = keep, detached."""

    def buffers(self) -> dict[str, Tensor]:
        """What training must remember besides `trained`."""

    def restore(self, buffers: dict[str, Tensor]) -> None:
        """Take `buffers` back."""


class SigmoidGates:
    """Gates sigmoid(zeta) under ``alpha * penalty + beta * (eRank(Z_S) - eRank(Z)) + gamma * distance``.

    ``penalty`` is |zeta|_1 or the sum of gates. The first is least at zeta = 0, where the gate is .5, the paper's
    threshold: gates that the task is indifferent to end there, on either side by rounding.

    Args:
        spec: resolved, without ``auto``.
        shape: L and H.
        spectra: the spectral terms; None when both are switched off.
        device: where zeta lives.
    """

    def __init__(
        self, spec: HeadsSpec, shape: tuple[int, int], spectra: RollingSpectra | None, device: torch.device
    ) -> None:
        self._zeta = torch.full(shape, spec.initial_zeta, device=device, requires_grad=True)
        self.trained = {"zeta": self._zeta}
        self._spec = spec
        self._spectra = spectra

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self._zeta], "scale": 1.0}]

    def draw(self, rng: np.random.Generator) -> Tensor:
        return torch.sigmoid(self._zeta)

    def regularise(self, gates: Tensor, place: Place) -> tuple[Tensor, dict[str, float]]:
        total = torch.zeros((), device=gates.device)
        terms = {"sparsity": 0.0, "erank": 0.0, "distance": 0.0}
        main = place.share[0] == 0
        if self._spectra is not None:
            surrogate, means = self._spectra.refresh(gates, place.step, place.share, place.reduce)
            terms["erank"], terms["distance"] = means.tolist()
            if main:
                total = total + surrogate
        if self._spec.alpha:
            sparsity = self._zeta.abs().sum() if self._spec.penalty == "l1" else gates.sum()
            terms["sparsity"] = float(sparsity.detach())
            if main:
                total = total + self._spec.alpha * sparsity
        return total, terms

    def gates(self) -> Tensor:
        return torch.sigmoid(self._zeta.detach())

    def scores(self) -> Tensor:
        return self._zeta.detach()

    def buffers(self) -> dict[str, Tensor]:
        if self._spectra is None:
            return {}
        return {"spectra.gradient": self._spectra.gradient, "spectra.values": self._spectra.values}

    def restore(self, buffers: dict[str, Tensor]) -> None:
        if self._spectra is not None:
            self._spectra.gradient, self._spectra.values = buffers["spectra.gradient"], buffers["spectra.values"]
