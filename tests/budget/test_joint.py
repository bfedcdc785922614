"""Heads and widths from one budget, against every combination."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.budget.cost import CostTable
from infoprune_export.budget.joint import allocate_jointly
from infoprune_export.errors import InfopruneError
from infoprune_export.models.elimination import Elimination


def curve(steps: list[int], seed: int) -> Elimination:
    order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(seed))
    return Elimination(order, torch.tensor([0.0, *itertools.accumulate(steps)], dtype=torch.float64))


def linear_table(blocks: int, heads: int, width: int, head_cost: float, neuron_cost: float, rest: float) -> CostTable:
    attention = tuple(head_cost * count for count in range(heads + 1))
    return CostTable("ms", (attention,) * blocks, (((0, width), (0.0, neuron_cost * width)),) * blocks, rest)


steps = st.lists(st.integers(0, 9), min_size=3, max_size=3)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(steps, steps, steps, steps, st.floats(1.05, 3.0), st.floats(0.5, 3.0))
def test_no_cheaper_combination_within_the_budget_does_less_damage(h0, h1, n0, n1, speed_up, head_cost):
    heads, neurons = [curve(h0, 0), curve(h1, 1)], [curve(n0, 2), curve(n1, 3)]
    table = linear_table(2, 3, 3, head_cost, 1.0, 1.0)
    allocation = allocate_jointly(heads, neurons, table, speed_up, 1)
    counts = [len(kept) for kept in allocation.heads]

    def damage(heads_kept, widths):
        return sum(float(e.cost[3 - k]) for e, k in zip([*heads, *neurons], [*heads_kept, *widths], strict=True))

    assert counts[-1] >= 1
    assert allocation.speed_up >= speed_up
    assert allocation.speed_up == pytest.approx(table.total / table.cost_of(counts, allocation.widths))
    # A hair below the budget, because costs are rounded up.
    room = table.total / speed_up * (1 - 1e-3)
    for first, last, *widths in itertools.product(range(4), range(1, 4), range(4), range(4)):
        if table.cost_of([first, last], widths) <= room:
            assert damage(counts, allocation.widths) <= damage([first, last], widths)


def test_what_is_kept_is_what_elimination_leaves_for_last():
    heads = [Elimination(torch.tensor([2, 0, 1]), torch.tensor([0.0, 1.0, 2.0, 90.0]).double())]
    neurons = [curve([50, 50, 50], 0)]
    allocation = allocate_jointly(heads, neurons, linear_table(1, 3, 3, 1.0, 1.0, 0.0), 1.4, 1)
    assert allocation.heads == ((1,),)
    assert allocation.widths == (3,)


def test_widths_are_multiples_or_full():
    neurons = [curve([1] * 10, 0), curve([2] * 10, 1)]
    heads = [curve([100], 0), curve([100], 0)]
    allocation = allocate_jointly(heads, neurons, linear_table(2, 1, 10, 0.1, 1.0, 0.0), 1.5, 4)
    assert all(width in (0, 4, 8, 10) for width in allocation.widths)


def test_a_speed_up_that_nothing_reaches_is_refused_with_the_largest():
    heads, neurons = [curve([1, 1], 0)], [curve([1, 1], 1)]
    table = linear_table(1, 2, 2, 1.0, 1.0, 2.0)
    with pytest.raises(InfopruneError, match=r"budget\.speed_up = 3: .* 2\.00 times as fast; ask for less"):
        allocate_jointly(heads, neurons, table, 3.0, 1)
    assert allocate_jointly(heads, neurons, table, 1.99, 1).heads == ((int(heads[0].order[-1]),),)


def test_one_part_alone_gives_up_everything_that_is_asked_for():
    heads, neurons = [curve([1, 1, 1], 0)] * 2, [curve([1, 1, 1, 1], 1)] * 2
    table = linear_table(2, 3, 4, 1.0, 1.0, 1.0)
    only_heads = allocate_jointly(heads, neurons, table, 1.3, 1, "heads")
    assert only_heads.widths == (4, 4)
    assert sum(map(len, only_heads.heads)) == 2
    only_ffn = allocate_jointly(heads, neurons, table, 1.3, 1, "ffn")
    assert list(map(len, only_ffn.heads)) == [3, 3]
    assert sum(only_ffn.widths) == 4
    with pytest.raises(InfopruneError, match=r"budget\.of = 'heads' lets go, .* 1\.50 times as fast"):
        allocate_jointly(heads, neurons, table, 2.0, 1, "heads")
