"""Truncated products: the best rank-k approximation of a linear map in the metric of its input."""

from __future__ import annotations

import torch
from torch import Tensor


def square_root(metric: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite [p, p]; unlike Cholesky's, there for singular ones too."""
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def truncate(weight: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Down [q, k] and up [k, p] of least ``|(W - down up) M^1/2|_F`` for W [q, p] and M [p, p], and the spectrum.

    With W M^1/2 = U S V^T that is U_k S_k V_k^T M^-1/2, which equals U_k U_k^T W: nothing is inverted. With M the
    covariance of the input it is the map of least mean squared output error; that error is the dropped part of S^2
    summed. float64; the spectrum is S, descending.
    """
    u, sigma, _ = torch.linalg.svd(weight.double() @ square_root(metric), full_matrices=False)
    down = u[:, :rank]
    return down, down.T @ weight.double(), sigma
