"""Streaming least squares: only second moments are kept, whatever the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

_STRIPE = 1280


class AffineFit:
    """Least squares of Y [n, q] on X [n, p], from rows that come in batches.

    Products are taken in the rows' own dtype, fp32 at least, and less the first batch's mean, which keeps what is small
    beside a large mean exact enough; sums are kept in `dtype` on the rows' device. Of X^T X stripes of rows are kept
    from their diagonal block to the right: with thousands of inputs this is where time and memory go.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype = torch.float64) -> None:
        self._sizes = (inputs, outputs)
        self._dtype = dtype
        self._count = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [n, p], y [n, q]."""
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(wide), y.to(wide)
        if not self._count:
            inputs, outputs = self._sizes
            self._shift_x, self._shift_y = x.mean(0), y.mean(0)
            self._xx = [
                torch.zeros(min(_STRIPE, inputs - start), inputs - start, dtype=self._dtype, device=x.device)
                for start in range(0, inputs, _STRIPE)
            ]
            self._xy = torch.zeros(inputs, outputs, dtype=self._dtype, device=x.device)
            self._x = torch.zeros(inputs, dtype=torch.float64, device=x.device)
            self._y = torch.zeros(outputs, dtype=torch.float64, device=x.device)
        x, y = x - self._shift_x, y - self._shift_y
        self._count += len(x)
        for number, stripe in enumerate(self._xx):
            start = number * _STRIPE
            _add_product(stripe, x[:, start : start + _STRIPE], x[:, start:])
        _add_product(self._xy, x, y)
        self._x += x.sum(0)
        self._y += y.sum(0)

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of X [p] and of Y [q], float64."""
        return self._shift_x + self._x / self._count, self._shift_y + self._y / self._count

    def covariance(self) -> Tensor:
        """Centred second moment of X, [p, p], in the dtype of the sums."""
        mean = self._x / self._count
        size = len(mean)
        whole = torch.empty(size, size, dtype=self._dtype, device=mean.device)
        for number, stripe in enumerate(self._xx):
            start, end = number * _STRIPE, number * _STRIPE + len(stripe)
            whole[start:end, start:] = stripe
            whole[end:, start:end] = stripe[:, end - start :].T
        return whole.div_(self._count).sub_(torch.outer(mean, mean))

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight [q, p] and bias [q], float64.

        They have the least ``|Y - X W^T - b|^2 / n + ridge * mean(diag(cov X)) * |W|^2``.
        """
        mean_x, mean_y = self.means()
        covariance = self.covariance().double()
        cross = self._xy.double() / self._count - torch.outer(self._x / self._count, self._y / self._count)
        if not len(covariance):
            return cross.T, mean_y
        # The floor keeps inputs that never vary solvable: their weight is zero.
        covariance.diagonal().add_((ridge * covariance.diagonal().mean()).clamp_min(1e-30))
        weight = torch.cholesky_solve(cross, torch.linalg.cholesky(covariance)).T
        return weight, mean_y - weight @ mean_x


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total`, in place."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right
