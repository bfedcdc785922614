"""Hard-concrete gates: their distribution against the closed form, and that they meet their budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.heads.hard_concrete import HardConcreteGates
from infoprune_export.heads.objective import Place

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=15)
CPU = torch.device("cpu")


def at(log_alpha: float, shape: tuple[int, int] = (100, 100)) -> HardConcreteGates:
    gates = HardConcreteGates(shape, 0.5, CPU)
    with torch.no_grad():
        gates.trained["log_alpha"].fill_(log_alpha)
    return gates


@REPEATABLE
@given(st.floats(-4, 4), st.integers(0, 1000))
def test_share_of_closed_gates_is_the_expected_one(log_alpha: float, seed: int):
    gates = at(log_alpha)
    drawn = gates.draw(np.random.default_rng(seed)).detach()
    expected = 1 / (1 + math.exp(log_alpha - 2 / 3 * math.log(0.1 / 1.1)))
    assert gates.expected_closed().item() == pytest.approx(expected, abs=1e-6)
    # five standard errors of 10000 draws
    assert (drawn == 0).float().mean().item() == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 10_000))
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_open_and_closed_are_exact():
    drawn = at(0.0).draw(np.random.default_rng(0)).detach()
    assert (drawn == 0).any()
    assert (drawn == 1).any()
    assert ((drawn > 0) & (drawn < 1)).any()
    assert torch.equal(at(9.0).gates(), torch.ones(100, 100))
    assert torch.equal(at(-9.0).gates(), torch.zeros(100, 100))
    torch.testing.assert_close(at(0.0).gates(), torch.full((100, 100), 0.5))


def test_the_same_noise_from_the_same_generator():
    draws = [at(0.0).draw(np.random.default_rng(seed)).detach() for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("remove", [0.25, 0.5])
def test_training_meets_the_budget_and_keeps_the_heads_that_matter(remove):
    """A loss that is large where any of the first heads is closed."""
    gates = HardConcreteGates((4, 10), remove, CPU)
    matters = torch.arange(40).view(4, 10) < 40 * (1 - remove)
    optimizer = torch.optim.AdamW(gates.groups(), lr=0.01, weight_decay=0.0)
    steps = 200
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group["scale"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        drawn = gates.draw(np.random.default_rng(step))
        penalty, terms = gates.regularise(drawn, Place(step, steps))
        optimizer.zero_grad()
        ((1 - drawn)[matters].sum() + penalty).backward()
        optimizer.step()
    assert terms["sparsity"] == pytest.approx(remove, abs=0.06)
    kept = gates.scores().flatten().argsort(descending=True)[: int(matters.sum())]
    assert matters.flatten()[kept].all()


def test_other_processes_add_nothing_but_have_a_gradient():
    gates = HardConcreteGates((2, 3), 0.5, CPU)
    drawn = gates.draw(np.random.default_rng(0))
    penalty, terms = gates.regularise(drawn, Place(5, 10, (1, 2)))
    assert terms["sparsity"] > 0
    penalty.backward()
    for tensor in gates.trained.values():
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    main, _ = gates.regularise(gates.draw(np.random.default_rng(0)), Place(5, 10, (0, 2)))
    main.backward()
    assert gates.trained["multipliers"].grad.abs().sum() > 0
