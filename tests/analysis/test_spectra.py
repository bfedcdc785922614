"""Spectral measures on closed cases, against SciPy, and their gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.analysis.spectra import effective_rank, ks_distance, singular_values, spectral_wasserstein
from infoprune_export.heads.spectral import SpectralTerms

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=40)
spectra = st.lists(st.integers(1, 12), min_size=1, max_size=9).map(lambda v: torch.tensor(v, dtype=torch.float64))


def activations(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ── Singular values and effective rank ───────────────────────────────────────


def test_singular_values_equal_svd_of_activations():
    z = activations(40, 7)
    expected = torch.linalg.svdvals(z).flip(0)
    torch.testing.assert_close(singular_values(z.T @ z), expected, rtol=1e-10, atol=0)


def test_singular_values_of_fp32_gram_are_float64():
    z = activations(40, 7)
    assert singular_values((z.T @ z).float()).dtype == torch.float64


def test_singular_values_of_rank_deficient_gram_are_clamped_at_a_millionth():
    sigma = singular_values(torch.diag(torch.tensor([4.0, -1e-9, 0.0])))
    torch.testing.assert_close(sigma, torch.tensor([2e-6, 2e-6, 2.0], dtype=torch.float64))


def test_singular_values_of_zero_gram_are_positive_and_finite():
    sigma = singular_values(torch.zeros(3, 3))
    assert (sigma > 0).all()
    assert sigma.max() < 1e-100


@pytest.mark.parametrize("size", [1, 2, 9])
def test_effective_rank_of_identity_is_its_size(size: int):
    assert effective_rank(singular_values(torch.eye(size))).item() == pytest.approx(size, rel=1e-12)


def test_effective_rank_of_rank_one_gram_is_one():
    v = activations(1, 8)[0]
    assert effective_rank(singular_values(torch.outer(v, v))).item() == pytest.approx(1.0, abs=2e-4)


def test_effective_rank_of_known_spectrum_equals_closed_form():
    # p = (1/4, 3/4): H = ln 4 - 3/4 ln 3
    sigma = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert effective_rank(sigma).item() == pytest.approx(4 / 3**0.75, rel=1e-12)


@REPEATABLE
@given(spectra, st.floats(1e-6, 1e6))
def test_effective_rank_ignores_scale_and_stays_between_one_and_size(sigma: torch.Tensor, scale: float):
    rank = effective_rank(sigma).item()
    assert effective_rank(scale * sigma).item() == pytest.approx(rank, rel=1e-9)
    assert 1 - 1e-12 <= rank <= len(sigma) + 1e-9


# ── Distances ────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # SciPy's p-value of tiny samples
@REPEATABLE
@given(spectra, spectra)
def test_ks_distance_equals_scipy(a: torch.Tensor, b: torch.Tensor):
    expected = scipy.stats.ks_2samp(a.numpy(), b.numpy(), method="asymp").statistic
    assert ks_distance(a, b).item() == pytest.approx(expected, abs=1e-12)


def test_ks_distance_of_disjoint_spectra_is_one_and_of_equal_zero():
    a = torch.tensor([3.0, 1.0, 2.0])
    assert ks_distance(a, a + 10).item() == 1.0
    assert ks_distance(a, a.flip(0)).item() == 0.0


def test_ks_distance_sees_a_single_shifted_value():
    assert ks_distance(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 2, 3, 9])).item() == pytest.approx(0.25)


def test_ks_distance_gives_no_gradient():
    assert not ks_distance(torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 3.0])).requires_grad


@REPEATABLE
@given(spectra, st.data())
def test_spectral_wasserstein_equals_scipy_over_reference_mean(reference: torch.Tensor, data: st.DataObject):
    values = data.draw(st.lists(st.integers(0, 20), min_size=len(reference), max_size=len(reference)))
    sigma = torch.tensor(values, dtype=torch.float64)
    expected = scipy.stats.wasserstein_distance(sigma.numpy(), reference.numpy()) / reference.mean().item()
    assert spectral_wasserstein(sigma, reference).item() == pytest.approx(expected, abs=1e-12)


def test_spectral_wasserstein_of_scaled_spectrum_is_the_relative_change():
    reference = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert spectral_wasserstein(0.7 * reference.flip(0), reference).item() == pytest.approx(0.3)


# ── Gradients ────────────────────────────────────────────────────────────────


def test_effective_rank_gradient_equals_finite_differences():
    z = activations(9, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: effective_rank(singular_values(z.T @ z)), (z,))


def test_spectral_wasserstein_gradient_equals_finite_differences():
    reference = torch.tensor([0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    z = activations(9, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spectral_wasserstein(singular_values(z.T @ z), reference), (z,))


@pytest.mark.parametrize(
    "gram",
    [torch.eye(6), torch.diag(torch.tensor([2.0, 2, 2, 1, 1, 1])), torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0]))],
    ids=["identity", "two triples", "rank two"],
)
def test_gradients_at_repeated_singular_values_are_finite_and_not_all_zero(gram: torch.Tensor):
    gates = torch.tensor([0.9, 0.9, 0.5], dtype=torch.float64, requires_grad=True)
    scale = gates.repeat_interleave(2)
    sigma = singular_values(scale[:, None] * gram * scale)
    (effective_rank(sigma) + spectral_wasserstein(sigma, singular_values(gram))).backward()
    assert gates.grad is not None
    assert torch.isfinite(gates.grad).all()
    assert gates.grad.abs().max() > 1e-3


# ── The gates' terms ─────────────────────────────────────────────────────────


def head_outputs() -> list[torch.Tensor]:
    """Z of two blocks: 3 heads of 2 and 2 heads of 4 channels."""
    return [activations(30, 6, seed=2), activations(30, 8, seed=3)]


def spectral_terms(distance: str) -> SpectralTerms:
    return SpectralTerms([z.T @ z for z in head_outputs()], [2, 4], distance)


@pytest.mark.parametrize("distance", ["ks", "wasserstein"])
def test_spectral_terms_of_open_gates_are_zero(distance: str):
    rank, moved = spectral_terms(distance)([torch.ones(3), torch.ones(2)])
    assert rank.item() == 0.0
    assert moved.item() == 0.0


@pytest.mark.parametrize("distance", ["ks", "wasserstein"])
def test_spectral_terms_equal_those_of_gated_activations(distance: str):
    gates = [torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64), torch.tensor([0.1, 0.8], dtype=torch.float64)]
    ranks, distances = [], []
    for z, gate, width in zip(head_outputs(), gates, [2, 4], strict=True):
        sigma = np.linalg.svd(z.numpy(), compute_uv=False)
        columns = np.repeat(gate.numpy(), width)
        gated = np.linalg.svd(z.numpy() * columns, compute_uv=False)
        entropies = [scipy.stats.entropy(s / s.sum()) for s in (gated, sigma)]
        ranks.append(np.exp(entropies[0]) - np.exp(entropies[1]))
        if distance == "ks":
            distances.append(scipy.stats.ks_2samp(gated, sigma, method="asymp").statistic)
        else:
            distances.append(scipy.stats.wasserstein_distance(gated, sigma) / sigma.mean())
    rank, moved = spectral_terms(distance)(gates)
    assert rank.item() == pytest.approx(np.mean(ranks), rel=1e-9)
    assert moved.item() == pytest.approx(np.mean(distances), rel=1e-9)


def test_spectral_terms_gradient_reaches_every_gate():
    gates = [torch.full((3,), 0.7, requires_grad=True), torch.full((2,), 0.4, requires_grad=True)]
    rank, moved = spectral_terms("wasserstein")(gates)
    (rank + moved).backward()
    assert all(gate.grad is not None and (gate.grad.abs() > 1e-6).all() for gate in gates)


def test_spectral_terms_with_a_closed_head_stay_finite():
    gates = [torch.tensor([0.0, 1.0, 1.0], requires_grad=True), torch.zeros(2, requires_grad=True)]
    rank, moved = spectral_terms("wasserstein")(gates)
    (rank + moved).backward()
    assert torch.isfinite(rank)
    assert torch.isfinite(moved)
    assert all(torch.isfinite(gate.grad).all() for gate in gates)
