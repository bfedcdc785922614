"""Optimal-brain-surgeon elimination against least squares solved from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infoprune_export.models import elimination
from infoprune_export.models.elimination import eliminate

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=80)
DAMPING = 1e-4


def problem(seed: int, outputs: int = 3, size: int = 6, rows: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight [D, m], covariance [m, m] with correlated columns, metric [D, D]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, size)) @ rng.normal(size=(size, size))
    g = rng.normal(size=(10, outputs)) * np.arange(1, outputs + 1)
    return rng.normal(size=(outputs, size)), np.atleast_2d(np.cov(x.T, bias=True)), g.T @ g / 10


def run(weight: np.ndarray, covariance: np.ndarray, metric: np.ndarray, **options: float):
    return eliminate(*(torch.from_numpy(array) for array in (weight, covariance, metric)), **options)


def best_loss_without(
    removed: list[int], weight: np.ndarray, covariance: np.ndarray, metric: np.ndarray, damping: float = DAMPING
) -> float:
    """Least E |G^1/2 (W - V) x|^2 over all V without these columns, as one ordinary least-squares problem."""
    size = len(covariance)
    regular = covariance + damping * np.diag(covariance).mean() * np.eye(size)
    x = np.linalg.cholesky(regular).T  # rows whose second moment is `regular`
    y = x @ weight.T
    kept = [j for j in range(size) if j not in removed]
    fitted = x[:, kept] @ np.linalg.lstsq(x[:, kept], y, rcond=None)[0] if kept else np.zeros_like(y)
    rest = y - fitted
    return float(np.trace(rest @ metric @ rest.T))


# ── One by one ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(6))
def test_eliminate_removes_first_what_costs_least(seed: int):
    case = problem(seed)
    costs = [best_loss_without([j], *case) for j in range(6)]
    result = run(*case)
    assert int(result.order[0]) == int(np.argmin(costs))
    assert result.cost[1].item() == pytest.approx(min(costs), rel=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_eliminate_every_later_step_is_greedy_too(seed: int):
    case = problem(seed)
    order = run(*case).order.tolist()
    for step in range(1, 6):
        gone = order[:step]
        costs = {j: best_loss_without([*gone, j], *case) for j in range(6) if j not in gone}
        assert order[step] == min(costs, key=costs.__getitem__)


@pytest.mark.parametrize("seed", range(6))
def test_eliminate_cost_is_the_loss_after_best_compensation(seed: int):
    case = problem(seed)
    result = run(*case)
    order = result.order.tolist()
    expected = [best_loss_without(order[:k], *case) for k in range(7)]
    np.testing.assert_allclose(result.cost.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_eliminate_damping_is_relative_to_the_mean_variance():
    case = problem(1)
    result = run(*case, damping=0.5)
    order = result.order.tolist()
    expected = [best_loss_without(order[:k], *case, damping=0.5) for k in range(7)]
    np.testing.assert_allclose(result.cost.numpy(), expected, rtol=1e-8, atol=1e-10)


@REPEATABLE
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12))
def test_eliminate_order_is_a_permutation_and_cost_never_falls(seed: int, size: int, rows: int):
    case = problem(seed, size=size, rows=rows)  # fewer rows than neurons: a singular covariance
    assume(rows > 1)  # one row has no variance
    result = run(*case)
    assert sorted(result.order.tolist()) == list(range(size))
    assert result.cost[0].item() == 0.0
    assert (result.cost.diff() >= 0).all()
    assert torch.isfinite(result.cost).all()


def test_eliminate_ties_go_to_the_lowest_index():
    result = eliminate(torch.ones(2, 5), torch.eye(5), torch.eye(2))
    assert result.order.tolist() == [0, 1, 2, 3, 4]


def test_eliminate_removes_one_of_two_copies_first_and_at_almost_no_cost():
    weight, covariance, metric = problem(3)
    double = [0, 1, 2, 3, 4, 5, 4]
    result = run(weight[:, double], covariance[np.ix_(double, double)], metric, damping=1e-8)
    assert int(result.order[0]) in (4, 6)
    assert result.cost[1] < 1e-4 * result.cost[2]


def test_eliminate_without_gradient_is_free():
    weight, covariance, _ = problem(0)
    result = run(weight, covariance, np.zeros((3, 3)))
    assert result.cost.tolist() == [0.0] * 7
    assert sorted(result.order.tolist()) == list(range(6))


def test_eliminate_of_constant_neurons_is_free():
    # an FFN whose neurons do not move over the calibration data: all of them can go
    weight, _, metric = problem(0)
    result = run(weight, np.zeros((6, 6)), metric)
    assert result.cost.abs().max() < 1e-12
    assert sorted(result.order.tolist()) == list(range(6))


def test_eliminate_leaves_its_inputs_alone():
    case = [torch.from_numpy(array) for array in problem(0)]
    before = [value.clone() for value in case]
    eliminate(*case)
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True))


# ── Groups and batches ───────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_eliminate_groups_is_greedy_and_its_cost_is_the_loss_after_compensation(seed: int):
    case = problem(seed, size=8)
    result = run(*case, group=2)
    gone: list[int] = []
    for step, group in enumerate(result.order.tolist()):
        left = [g for g in range(4) if g not in result.order[:step].tolist()]
        costs = {g: best_loss_without([*gone, 2 * g, 2 * g + 1], *case) for g in left}
        assert group == min(costs, key=costs.__getitem__)
        gone += [2 * group, 2 * group + 1]
        assert result.cost[step + 1].item() == pytest.approx(costs[group], rel=1e-7, abs=1e-9)


def test_eliminate_in_batches_costs_little_more_than_one_by_one(monkeypatch):
    case = problem(5, outputs=8, size=120, rows=400)
    exact = run(*case)
    monkeypatch.setattr(elimination, "_BATCH", 8)
    monkeypatch.setattr(elimination, "_POOL", 24)
    batched = run(*case)
    order = batched.order.tolist()
    assert sorted(order) == list(range(120))
    for k in (8, 30, 60, 119):
        assert batched.cost[k].item() == pytest.approx(best_loss_without(order[:k], *case), rel=1e-6)
        assert batched.cost[k] <= 1.05 * exact.cost[k]


def test_a_batch_never_takes_both_of_two_copies(monkeypatch):
    """Each is free as long as the other stays; removed together they are not."""
    weight, covariance, metric = problem(3, size=12, rows=60)
    double = [*range(12), *range(12)]
    monkeypatch.setattr(elimination, "_BATCH", 12)
    monkeypatch.setattr(elimination, "_POOL", 16)
    result = run(weight[:, double], covariance[np.ix_(double, double)], metric, damping=1e-9)
    assert sorted(j % 12 for j in result.order[:12].tolist()) == list(range(12))
