"""Backward elimination by optimal brain surgeon: which inputs of a projection go first, and what each costs.

Removing the group J of inputs of y = W h and letting the rest compensate costs

    tr(W_J^T G W_J ([C^-1]_JJ)^-1)

in the metric of `models.moments`. The cheapest group goes, W and C^-1 are updated exactly, and so on; the running sum
is the projection's cost curve. An FFN's neurons are groups of one, an attention's heads groups of head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 1e-4
# Updates of the large matrices are done this many inputs at a time, chosen one by one among the cheapest few.
_BATCH, _POOL = 256, 512


@dataclass(frozen=True)
class Elimination:
    """``order[i]`` is the i-th group to go; ``cost[k]`` the summed cost of removing the first k, cost[0] = 0."""

    order: Tensor
    cost: Tensor


def eliminate(
    weight: Tensor, covariance: Tensor, metric: Tensor, *, group: int = 1, damping: float = _DAMPING
) -> Elimination:
    """Eliminate the columns of `weight` [D, p], in groups of `group` neighbours, until none is left.

    `covariance` is C [p, p], `metric` G [D, D]. Exact greedy up to 512 columns; beyond, up to 256 columns are chosen
    one by one among the 512 cheapest, and all others see them removed together. Ties go to the lowest index.
    float64, O(p^3).
    """
    size = len(covariance)
    # The floor keeps inputs that never vary invertible: they are free.
    loading = (damping * covariance.double().diagonal().mean()).clamp_min(1e-30)
    damped = covariance.to(torch.float64, copy=True)
    damped.diagonal().add_(loading)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    del damped
    # |G^1/2 w|^2 = w^T G w, so the columns can live in G's square root.
    values, vectors = torch.linalg.eigh(metric.double())
    columns = (values.clamp_min(0).sqrt()[:, None] * vectors.T) @ weight.detach().double().cpu()
    there, alive = torch.arange(size // group), torch.ones(size // group, dtype=torch.bool)
    order: list[int] = []
    summed: list[float] = []
    while alive.any():
        prices, ranked = _prices_alone(columns, precision, alive).sort(stable=True)
        left, places = int(alive.sum()), max(1, _POOL // group)
        pool = ranked[: min(places, left)].sort().values
        inside = _members(pool, group)
        # Whatever becomes dearer than the cheapest outside has to wait: its twin may have just gone.
        limit = float(prices[places]) if places < left else float("inf")
        steps = max(1, _BATCH // group) if places < left else left
        within = columns[:, inside]
        picked, costs = _greedy(within.T @ within, precision[inside[:, None], inside], group, steps, limit)
        chosen = pool[picked]
        order += there[chosen].tolist()
        summed += costs
        alive[chosen] = False
        if left - len(picked) == 0:
            break
        _remove(columns, precision, _members(chosen, group))
        if left < 0.7 * len(alive):
            # What is gone is zero by now; copying the rest is cheaper than carrying it on.
            stays = _members(alive.nonzero().flatten(), group)
            columns, precision = columns[:, stays], precision[stays[:, None], stays]
            there, alive = there[alive], alive[alive]
    cost = torch.tensor([0.0, *summed], dtype=torch.float64).cumsum(0)
    return Elimination(torch.tensor(order, dtype=torch.long), cost)


def _members(groups: Tensor, group: int) -> Tensor:
    return (groups[:, None] * group + torch.arange(group)).flatten()


def _prices_alone(columns: Tensor, precision: Tensor, alive: Tensor) -> Tensor:
    """Cost of removing each group alone, [groups]; infinite for those gone."""
    group = len(precision) // len(alive)
    if group == 1:
        product = columns.square().sum(0)[:, None, None]
    else:
        grouped = columns.unflatten(1, (-1, group)).movedim(0, 1)  # [groups, D, group]
        product = grouped.mT @ grouped
    prices = torch.full((len(alive),), torch.inf, dtype=torch.float64)
    prices[alive] = _prices(product[alive], _diagonal_blocks(precision, group)[alive])
    return prices


def _diagonal_blocks(matrix: Tensor, group: int) -> Tensor:
    """[p / group, group, group], a copy."""
    blocks = matrix.unflatten(0, (-1, group)).unflatten(2, (-1, group))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()


def _prices(product: Tensor, precision: Tensor) -> Tensor:
    """tr(W_J^T G W_J P_JJ^-1) of every group, both [groups, group, group]."""
    if precision.shape[-1] == 1:
        return (product / precision.clamp_min(torch.finfo(torch.float64).tiny)).flatten().clamp_min(0)
    return torch.linalg.solve(precision, product).diagonal(dim1=-2, dim2=-1).sum(-1)


def _greedy(product: Tensor, precision: Tensor, group: int, steps: int, limit: float) -> tuple[Tensor, list[float]]:
    """Positions of the next groups to go within this pool, and what each costs when it goes; at least one.

    `product` is W^T G W of the pool, `precision` its part of C^-1; both stay as they are. With row P_J of the precision
    when J goes, c = P_JJ^-1 P_J and u = M_J - M_JJ c / 2, the rest becomes P - P_J^T c and M - c^T u - u^T c. Only
    diagonal blocks are kept up to date; a row is made from these factors when its group goes.
    """
    count = len(precision) // group
    alive = torch.ones(count, dtype=torch.bool)
    most = min(steps, count)
    rows, couplings, mixed = (torch.zeros(most * group, count * group, dtype=torch.float64) for _ in range(3))
    own_product, own_precision = _diagonal_blocks(product, group), _diagonal_blocks(precision, group)
    picked: list[int] = []
    costs: list[float] = []
    for step in range(most):
        prices = _prices(own_product, own_precision).masked_fill_(~alive, torch.inf)
        j = int(prices.argmin())
        cost = float(prices[j])
        if picked and cost > limit:
            break
        picked.append(j)
        costs.append(cost)
        alive[j] = False
        own = slice(j * group, (j + 1) * group)
        past, now = slice(step * group), slice(step * group, (step + 1) * group)
        row = precision[own] - rows[past, own].T @ couplings[past]
        coupling = torch.linalg.solve(row[:, own], row)
        mix = product[own] - couplings[past, own].T @ mixed[past] - mixed[past, own].T @ couplings[past]
        mix -= mix[:, own] @ coupling / 2
        rows[now], couplings[now], mixed[now] = row, coupling, mix
        by_group = (part.unflatten(1, (count, group)).movedim(1, 0) for part in (row, coupling, mix))
        row, coupling, mix = by_group  # [groups, group, group]
        own_precision -= row.mT @ coupling
        own_product -= coupling.mT @ mix + mix.mT @ coupling
        own_precision[j] = torch.eye(group, dtype=torch.float64)  # solvable, and never asked for again
    return torch.tensor(picked, dtype=torch.long), costs


def _remove(columns: Tensor, precision: Tensor, gone: Tensor) -> None:
    """Let what stays compensate for the columns that go, in place; their own become zero."""
    coupling = torch.linalg.solve(precision[gone[:, None], gone], precision[gone])
    columns.addmm_(columns[:, gone], coupling, alpha=-1)
    precision.addmm_(precision[:, gone], coupling, alpha=-1)
