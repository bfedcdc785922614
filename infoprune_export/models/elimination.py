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
_BATCH, _POOL = 64, 256


@dataclass(frozen=True)
class Elimination:
    """``order[i]`` is the i-th group to go; ``cost[k]`` the summed cost of removing the first k, cost[0] = 0."""

    order: Tensor
    cost: Tensor


def eliminate(
    weight: Tensor, covariance: Tensor, metric: Tensor, *, group: int = 1, damping: float = _DAMPING
) -> Elimination:
    """Eliminate the columns of `weight` [D, p], in groups of `group` neighbours, until none is left.

    `covariance` is C [p, p], `metric` G [D, D]. Exact greedy up to 256 columns; beyond, up to 64 columns are chosen
    one by one among the 256 cheapest, and all others see them removed together. Ties go to the
    lowest index. float64, O(p^3).
    """
    size = len(covariance)
    # The floor keeps inputs that never vary invertible: they are free.
    loading = (damping * covariance.double().diagonal().mean()).clamp_min(1e-30)
    precision = torch.cholesky_inverse(
        torch.linalg.cholesky(covariance.double() + loading * torch.eye(size, dtype=torch.float64))
    )
    # |G^1/2 w|^2 = w^T G w, so the columns can live in G's square root.
    values, vectors = torch.linalg.eigh(metric.double())
    columns = (values.clamp_min(0).sqrt()[:, None] * vectors.T) @ weight.detach().double().cpu()
    there, alive = torch.arange(size // group), torch.ones(size // group, dtype=torch.bool)
    order: list[int] = []
    summed: list[float] = []
    while alive.any():
        prices, ranked = _prices_alone(columns, precision, group, alive).sort(stable=True)
        left, places = int(alive.sum()), max(1, _POOL // group)
        pool = ranked[: min(places, left)].sort().values
        inside = _members(pool, group)
        # Whatever becomes dearer than the cheapest outside has to wait: its twin may have just gone.
        limit = float(prices[places]) if places < left else float("inf")
        steps = max(1, _BATCH // group) if places < left else left
        product = columns[:, inside].T @ columns[:, inside]
        picked, costs = _greedy(product, precision[inside][:, inside], group, steps, limit)
        chosen = pool[picked]
        order += there[chosen].tolist()
        summed += costs
        _remove(columns, precision, _members(chosen, group))
        alive[chosen] = False
        if left < 0.7 * len(alive):
            # What is gone is zero by now; copying the rest is cheaper than carrying it on.
            stays = alive.repeat_interleave(group)
            columns, precision = columns[:, stays], precision[stays][:, stays]
            there, alive = there[alive], alive[alive]
    cost = torch.tensor([0.0, *summed], dtype=torch.float64).cumsum(0)
    return Elimination(torch.tensor(order, dtype=torch.long), cost)


def _members(groups: Tensor, group: int) -> Tensor:
    return (groups[:, None] * group + torch.arange(group)).flatten()


def _prices_alone(columns: Tensor, precision: Tensor, group: int, alive: Tensor) -> Tensor:
    """Cost of removing each group alone, [p / group]; infinite for those gone."""
    prices = torch.full((len(alive),), torch.inf, dtype=torch.float64)
    if group == 1:
        prices = torch.linalg.vector_norm(columns, dim=0).square() / _positive(precision.diagonal())
        prices[~alive] = torch.inf
    for j in alive.nonzero().flatten().tolist() if group > 1 else ():
        own = slice(j * group, (j + 1) * group)
        prices[j] = _price(columns[:, own].T @ columns[:, own], precision[own, own])
    return prices


def _price(product: Tensor, precision: Tensor) -> Tensor:
    """tr(W_J^T G W_J P_JJ^-1), for one group."""
    return torch.linalg.solve(precision, product).trace()


def _positive(diagonal: Tensor) -> Tensor:
    return diagonal.clamp_min(torch.finfo(torch.float64).tiny)


def _greedy(product: Tensor, precision: Tensor, group: int, steps: int, limit: float) -> tuple[Tensor, list[float]]:
    """Positions of the next groups to go within this pool, and what each costs when it goes; at least one.

    `product` is W^T G W of the pool. Both matrices are used up.
    """
    count = len(precision) // group
    alive = torch.ones(count, dtype=torch.bool)
    picked: list[int] = []
    costs: list[float] = []
    for _ in range(min(steps, count)):
        if group == 1:
            prices = product.diagonal().clamp_min(0) / _positive(precision.diagonal())
        else:
            prices = torch.zeros(count, dtype=torch.float64)
            for j in alive.nonzero().flatten().tolist():
                own = slice(j * group, (j + 1) * group)
                prices[j] = _price(product[own, own], precision[own, own])
        prices[~alive] = torch.inf
        j = int(prices.argmin())
        if picked and prices[j] > limit:
            break
        picked.append(j)
        costs.append(float(prices[j]))
        alive[j] = False
        gone = slice(j * group, (j + 1) * group)
        coupling = torch.linalg.solve(precision[gone, gone], precision[gone])
        precision.addmm_(precision[:, gone].clone(), coupling, alpha=-1)
        # (W - W_J c)^T G (W - W_J c)
        mixed = product[:, gone].clone() @ coupling
        product += coupling.T @ product[gone, gone].clone() @ coupling - mixed - mixed.T
    return torch.tensor(picked, dtype=torch.long), costs


def _remove(columns: Tensor, precision: Tensor, gone: Tensor) -> None:
    """Let what stays compensate for the columns that go, in place; their own become zero."""
    coupling = torch.linalg.solve(precision[gone][:, gone], precision[gone])
    columns.addmm_(columns[:, gone], coupling, alpha=-1)
    precision.addmm_(precision[:, gone], coupling, alpha=-1)
