"""Which heads and neurons of the language model stay: options with their costs per layer, one budget over all layers.

Removing inputs J of a projection W and letting the others compensate costs ``tr(W_J^T G W_J ([C^-1]_JJ)^-1)`` (optimal
brain surgeon for a group of columns), C being the inputs' second moment and G that of the loss gradient at the output.
``random`` draws what goes, as much of it in every layer: the control.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.language.plan import LanguagePlan, LayerSize, sizes_of
from infoprune_export.models.elimination import eliminate
from infoprune_export.models.language import LanguageLayer
from infoprune_export.models.moments import Moments
from infoprune_export.recipe import LanguageSpec

_DAMPING = 1e-4


@dataclass(frozen=True)
class Option:
    """Something a layer could keep (ascending), how large it is in the budget's units, and what it costs."""

    kept: tuple[int, ...]
    size: int
    cost: float


# ── Costs ────────────────────────────────────────────────────────────────────


class GroupElimination:
    """A projection whose inputs leave by any groups in any order while the rest compensates; float64."""

    def __init__(self, weight: Tensor, moments: Moments, damping: float = _DAMPING) -> None:
        inputs = moments.covariance.double()
        # The floor keeps inputs that never vary invertible: they are free.
        loading = (damping * inputs.diagonal().mean()).clamp_min(1e-30)
        self._inverse = torch.linalg.inv(inputs + loading * torch.eye(len(inputs), dtype=torch.float64))
        # |G^1/2 w|^2 = w^T G w, so the columns can live in G's square root.
        values, vectors = torch.linalg.eigh(moments.metric.double())
        self._columns = (values.clamp_min(0).sqrt()[:, None] * vectors.T) @ weight.detach().double().cpu()

    def price(self, group: Sequence[int]) -> float:
        """What removing these inputs next costs."""
        columns = self._columns[:, group]
        return float((columns * torch.linalg.solve(self._block(group), columns.T).T).sum())

    def remove(self, group: Sequence[int]) -> float:
        """Remove these inputs; their price."""
        price = self.price(group)
        pulled = torch.linalg.solve(self._block(group), self._inverse[group])
        self._columns -= self._columns[:, group] @ pulled
        self._inverse -= self._inverse[:, group] @ pulled
        self._columns[:, group] = 0
        return price

    def _block(self, group: Sequence[int]) -> Tensor:
        return self._inverse[group][:, group]


def head_options(layer: LanguageLayer, moments: Moments) -> list[Option]:
    """For every number of key-value heads and of query heads in each, the heads that greedy elimination leaves.

    Query heads leave by rounds, the cheapest of every group at a time; behind each round whole groups leave, cheapest
    first. Ties go to the lowest index.
    """
    size, width = sizes_of([layer])[0], layer.head_dim

    def inputs(heads: Sequence[int]) -> list[int]:
        return [head * width + channel for head in heads for channel in range(width)]

    whole = GroupElimination(layer.attention_out.weight, moments)
    groups = _groups(size)
    options, spent = [], 0.0
    while True:
        rest, left, cost = copy.deepcopy(whole), list(groups), spent
        options.append(_head_option(left, cost))
        while len(left) > 1:
            prices = [rest.price(inputs(group)) for group in left]
            cost += rest.remove(inputs(left.pop(int(np.argmin(prices)))))
            options.append(_head_option(left, cost))
        if len(groups[0]) == 1:
            return options
        for number, group in enumerate(groups):
            gone = group[int(np.argmin([whole.price(inputs([head])) for head in group]))]
            spent += whole.remove(inputs([gone]))
            groups[number] = [head for head in group if head != gone]


def neuron_options(layer: LanguageLayer, moments: Moments, round_to: int) -> list[Option]:
    """Widths that are multiples of `round_to`, at least one of them, or the full width; see `models.elimination`."""
    elimination = eliminate(layer.ffn_out.weight, moments.covariance, moments.metric)
    return _neuron_options(elimination.order, elimination.cost, round_to)


def random_head_options(size: LayerSize, rng: np.random.Generator) -> list[Option]:
    """As `head_options`, drawn at random; the cost, the squared share that goes, makes all layers lose alike."""
    groups = [list(rng.permutation(group)) for group in _groups(size)]
    order = rng.permutation(len(groups))
    options = []
    for queries in range(1, len(groups[0]) + 1):
        for count in range(1, len(groups) + 1):
            option = _head_option([groups[number][:queries] for number in order[:count]], 0.0)
            options.append(Option(option.kept, option.size, (1 - option.size / size.attention_units) ** 2))
    return options


def random_neuron_options(size: LayerSize, rng: np.random.Generator, round_to: int) -> list[Option]:
    """As `neuron_options`, drawn at random and costing as in `random_head_options`."""
    order = torch.from_numpy(rng.permutation(size.neurons))
    gone = torch.arange(size.neurons + 1, dtype=torch.float64)
    return _neuron_options(order, (gone / size.neurons).square(), round_to)


def _groups(size: LayerSize) -> list[list[int]]:
    return [list(group) for group in np.arange(size.heads).reshape(size.key_value_heads, -1).tolist()]


def _head_option(groups: Sequence[Sequence[int]], cost: float) -> Option:
    heads = sorted(int(head) for group in groups for head in group)
    return Option(tuple(heads), LayerSize(len(heads), len(groups), 0).attention_units, cost)


def _neuron_options(order: Tensor, cost: Tensor, round_to: int) -> list[Option]:
    full = len(order)
    widths = sorted({*range(round_to, full, round_to), full})
    return [Option(tuple(sorted(order[full - width :].tolist())), width, float(cost[full - width])) for width in widths]


# ── Budget ───────────────────────────────────────────────────────────────────


def choose(options: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option per layer, of summed size at most `budget` and least summed cost; exact. Of equal costs the smaller.

    Raises:
        InfopruneError: the smallest options are larger than the budget.
    """
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    picks = []
    for layer in options:
        grown, pick = np.full(budget + 1, np.inf), np.zeros(budget + 1, dtype=np.int32)
        for number, option in enumerate(layer):
            if option.size > budget:
                continue
            costs = best[: budget + 1 - option.size] + option.cost
            cheaper = costs < grown[option.size :]
            grown[option.size :][cheaper] = costs[cheaper]
            pick[option.size :][cheaper] = number
        best = grown
        picks.append(pick)
    used = int(best.argmin())
    if not np.isfinite(best[used]):
        least = sum(min(option.size for option in layer) for layer in options)
        raise InfopruneError(f"a budget of {budget} is below {least}, the least that the layers need; raise it")
    chosen = []
    for layer, pick in zip(reversed(options), reversed(picks), strict=True):
        option = layer[pick[used]]
        chosen.append(option)
        used -= option.size
    return chosen[::-1]


def check_budget(total: Sequence[LayerSize], spec: LanguageSpec) -> tuple[int, int]:
    """Units of attention, and neurons, that the language model may keep.

    Raises:
        InfopruneError: fewer than one key-value head with one query head, or fewer than `round_to` neurons (all, of a
            narrower layer), for every layer.
    """
    units = sum(size.attention_units for size in total)
    neurons = sum(size.neurons for size in total)
    # Removed is rounded down: 0.3 of 10 heads are 3, though 0.7 * 10 in floating point is less than 7.
    keep_units = units - int(spec.remove_heads * units + 1e-9)
    keep_neurons = int(spec.keep_macs * neurons + 1e-9)
    least_units = sum(LayerSize(1, 1, 0).attention_units for _ in total)
    least_neurons = sum(min(spec.round_to, size.neurons) for size in total)
    if keep_units < least_units:
        raise InfopruneError(
            f"language.remove_heads = {spec.remove_heads} leaves {keep_units} units of attention (a query or key-value "
            f"head is one) for {len(total)} layers, which need {least_units}: one head each; lower it"
        )
    if keep_neurons < least_neurons:
        raise InfopruneError(
            f"language.keep_macs = {spec.keep_macs} leaves {keep_neurons} neurons for {len(total)} layers, which need "
            f"{least_neurons} with language.round_to = {spec.round_to}; raise the one or lower the other"
        )
    return keep_units, keep_neurons


def plan_of(
    total: Sequence[LayerSize], spec: LanguageSpec, options: Iterator[tuple[list[Option], list[Option]]]
) -> LanguagePlan:
    """The cheapest plan within the budget; `options` are those for heads and for neurons, layer by layer.

    Raises:
        InfopruneError: see `check_budget`.
    """
    units, neurons = check_budget(total, spec)
    for_heads, for_neurons = zip(*options, strict=True)
    heads, widths = choose(for_heads, units), choose(for_neurons, neurons)
    return LanguagePlan(tuple(total), tuple(o.kept for o in heads), tuple(o.kept for o in widths))
