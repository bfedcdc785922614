"""Spectral measures of the structural paper, on Gram matrices.

All take the Gram C = Z^T Z [d, d] of some activations Z [n, d], or its spectrum, in float64: the singular values of Z
are the square roots of C's eigenvalues. Gradients flow through ``eigvalsh`` only; through eigenvectors they would be
infinite at repeated singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CLAMP = 1e-12


def singular_values(gram: Tensor) -> Tensor:
    """Singular values of Z from its Gram [d, d], ascending, float64 [d].

    Eigenvalues are clamped at 1e-12 of the largest: the entropy's gradient is infinite at zero, and rounding makes
    small eigenvalues negative.
    """
    eigenvalues = torch.linalg.eigvalsh(gram.double())
    floor = (_CLAMP * eigenvalues[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    return eigenvalues.clamp_min(floor.detach()).sqrt()


def effective_rank(sigma: Tensor) -> Tensor:
    """Exp of the entropy of sigma / sum(sigma) (paper A, equation 2). Scale-invariant, between 1 and len(sigma)."""
    p = sigma / sigma.sum()
    return torch.exp(-(p * p.log()).sum())


def ks_distance(sigma_a: Tensor, sigma_b: Tensor) -> Tensor:
    """Sup |F_a - F_b| of the two empirical distribution functions (paper A, equation 6), in [0, 1].

    Piecewise constant in its arguments: its gradient is zero wherever it exists, and none is given.
    """
    a, b = sigma_a.detach().sort().values, sigma_b.detach().sort().values
    grid = torch.cat([a, b])
    cdf_a = torch.searchsorted(a, grid, right=True).double() / len(a)
    cdf_b = torch.searchsorted(b, grid, right=True).double() / len(b)
    return (cdf_a - cdf_b).abs().max()


def spectral_wasserstein(sigma: Tensor, reference: Tensor) -> Tensor:
    """Mean |sigma_(i) - reference_(i)| over sorted pairs, relative to the reference's mean.

    The Wasserstein-1 distance of two spectra of equal length: like KS it compares distributions of singular values, but
    it sees their scale and has a gradient everywhere.
    """
    return (sigma.sort().values - reference.sort().values).abs().mean() / reference.mean()
