"""Stochastic gates that are exactly 0 or 1 most of the time, trained to an expected sparsity.

Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization" (2018): with noise u,
``s = sigmoid((log u - log(1 - u) + log_alpha) / T)`` is stretched to (l, r) = (-.1, 1.1) and clipped to [0, 1], T =
2/3. A gate is open with probability ``sigmoid(log_alpha - T log(-l / r))``. The expected share of closed gates s meets
its target t by the Lagrangian ``m1 (s - t) + m2 (s - t)^2`` of Xia, Zhong and Chen (CoFi, 2022), whose multipliers
ascend; t grows linearly from 0 to its end over the first half of training. Weights stay frozen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infoprune_export.heads.objective import Place

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3
_OPEN = 2.0
# Gates have to travel from open to closed within a few hundred steps, ten times as far as a sigmoid gate's.
_SCALE = 10.0


class HardConcreteGates:
    """Hard-concrete gates of L blocks of H heads; see the module.

    Args:
        shape: L and H.
        remove: expected share of closed gates to meet.
        device: where the parameters live.
    """

    def __init__(self, shape: tuple[int, int], remove: float, device: torch.device) -> None:
        self._log_alpha = torch.full(shape, _OPEN, device=device, requires_grad=True)
        self._multipliers = torch.zeros(2, device=device, requires_grad=True)
        self.trained = {"log_alpha": self._log_alpha, "multipliers": self._multipliers}
        self._remove = remove

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self._log_alpha], "scale": _SCALE},
            {"params": [self._multipliers], "scale": _SCALE, "maximize": True},
        ]

    def draw(self, rng: np.random.Generator) -> Tensor:
        noise = torch.from_numpy(rng.logistic(size=self._log_alpha.shape)).to(self._log_alpha)
        return _stretch((noise + self._log_alpha) / _TEMPERATURE)

    def expected_closed(self) -> Tensor:
        """Share of gates that are expected to be exactly 0, a scalar."""
        return 1 - torch.sigmoid(self._log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH)).mean()

    def regularise(self, gates: Tensor, place: Place) -> tuple[Tensor, dict[str, float]]:
        target = self._remove * min(1.0, 2 * place.step / place.steps)
        closed = self.expected_closed()
        terms = {"sparsity": float(closed.detach()), "erank": 0.0, "distance": 0.0}
        gap = closed - target
        if place.share[0]:
            # Every process needs a gradient of every tensor, or they would wait for each other's sums.
            gap = 0.0 * gap
        return self._multipliers[0] * gap + self._multipliers[1] * gap.square(), terms

    def gates(self) -> Tensor:
        """The gates without noise; unlike in `draw`, log_alpha is not divided by the temperature."""
        return _stretch(self._log_alpha.detach())

    def scores(self) -> Tensor:
        return self._log_alpha.detach()

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def restore(self, buffers: dict[str, Tensor]) -> None:
        """There is nothing besides the trained tensors."""


def _stretch(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
