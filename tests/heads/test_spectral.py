"""Spectral terms in turns: what a step computes, what it keeps, and what it costs nothing to leave out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.heads.spectral import RollingSpectra, SpectralTerms

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=15)
BLOCKS, HEADS, WIDTH = 5, 3, 2


def grams() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BLOCKS, 30, HEADS * WIDTH, generator=generator, dtype=torch.float64)
    return list(z.transpose(1, 2) @ z)


def rolling(per_step: int, distance: str | None = "wasserstein", *, rank: bool = True) -> RollingSpectra:
    terms = SpectralTerms(grams(), [WIDTH] * BLOCKS, distance, rank=rank)
    return RollingSpectra(terms, (BLOCKS, HEADS), per_step, beta=0.7, gamma=1.3)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def some_gates(seed: int = 1) -> torch.Tensor:
    return 0.2 + 0.7 * torch.rand(BLOCKS, HEADS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_slope(gates: torch.Tensor) -> torch.Tensor:
    gates = gates.clone().requires_grad_()
    rank, distance = SpectralTerms(grams(), [WIDTH] * BLOCKS, "wasserstein")(list(gates))
    return torch.autograd.grad(0.7 * rank + 1.3 * distance, gates)[0]


@REPEATABLE
@given(st.integers(1, 7), st.integers(0, 10**6))
def test_the_first_step_has_the_exact_gradient_and_means(per_step: int, seed: int):
    gates = some_gates(seed).requires_grad_()
    added, means = rolling(per_step).refresh(gates, 0, (0, 1), alone)
    torch.testing.assert_close(torch.autograd.grad(added, gates)[0], exact_slope(gates.detach()))
    expected = SpectralTerms(grams(), [WIDTH] * BLOCKS, "wasserstein")(list(gates.detach()))
    torch.testing.assert_close(means, torch.stack(expected))


def test_gradient_equals_finite_differences():
    gates, step = some_gates(), 1e-6
    slope = exact_slope(gates)
    terms = SpectralTerms(grams(), [WIDTH] * BLOCKS, "wasserstein")
    for block, head in ((0, 0), (2, 1), (4, 2)):
        ends = []
        for sign in (1, -1):
            moved = gates.clone()
            moved[block, head] += sign * step
            rank, distance = terms(list(moved))
            ends.append(0.7 * rank + 1.3 * distance)
        assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(slope[block, head].item(), rel=1e-4)


def test_blocks_take_turns_and_the_others_keep_their_last_gradient():
    spectra, before, after = rolling(2), some_gates(1), some_gates(2)
    spectra.refresh(before, 0, (0, 1), alone)
    old, new = exact_slope(before) * BLOCKS, exact_slope(after) * BLOCKS
    torch.testing.assert_close(spectra.gradient, old)
    expected = old.clone()
    for step, turn in ((1, [2, 3]), (2, [4, 0]), (3, [1, 2])):
        spectra.refresh(after, step, (0, 1), alone)
        expected[turn] = new[turn]
        torch.testing.assert_close(spectra.gradient, expected)
    torch.testing.assert_close(spectra.gradient, new)


def test_shares_of_several_processes_sum_to_one_process():
    first, second = some_gates(1), some_gates(2)
    single = rolling(3)
    several = [rolling(3) for _ in range(2)]
    for step, gates in enumerate((first, second, first)):
        single.refresh(gates, step, (0, 1), alone)
        parts: list[list[torch.Tensor]] = [[], []]
        for index, spectra in enumerate(several):
            spectra.refresh(gates, step, (index, 2), lambda t, own=parts[index]: own.append(t) or t)
        gradient, values = (a + b for a, b in zip(*parts, strict=True))
        for spectra in several:
            spectra.gradient, spectra.values = gradient, values
        torch.testing.assert_close(gradient, single.gradient)
        torch.testing.assert_close(values, single.values)


def test_ks_alone_has_a_value_and_no_gradient():
    spectra = rolling(BLOCKS, "ks", rank=False)
    added, means = spectra.refresh(some_gates().requires_grad_(), 0, (0, 1), alone)
    assert added.item() == 0.0
    assert means[0] == 0
    assert means[1] > 0


def test_what_is_left_out_is_zero():
    no_distance, no_rank = rolling(BLOCKS, None), rolling(BLOCKS, rank=False)
    for spectra, zero in ((no_distance, 1), (no_rank, 0)):
        _, means = spectra.refresh(some_gates(), 0, (0, 1), alone)
        assert means[zero] == 0
        assert means[1 - zero] != 0


def test_gradient_at_equal_singular_values_is_finite():
    terms = SpectralTerms([torch.eye(HEADS * WIDTH, dtype=torch.float64)] * 2, [WIDTH] * 2, "wasserstein")
    spectra = RollingSpectra(terms, (2, HEADS), 2, 1.0, 1.0)
    spectra.refresh(torch.full((2, HEADS), 0.5), 0, (0, 1), alone)
    assert torch.isfinite(spectra.gradient).all()
    assert (spectra.gradient < 0).all(), "opening a gate brings the spectrum closer to the original's"
