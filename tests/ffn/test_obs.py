"""Width allocation against every combination."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.obs import allocate
from infoprune_export.models.allocation import choose

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=80)


def every_choice(costs: list[list[int]], budget: int, round_to: int):
    """(summed cost, neurons, widths) of every admissible combination."""
    options = []
    for cost in costs:
        full = len(cost) - 1
        options.append([width for width in range(full + 1) if width % round_to == 0 or width == full])
    for widths in itertools.product(*options):
        if sum(widths) <= budget:
            total = sum(cost[len(cost) - 1 - width] for cost, width in zip(costs, widths, strict=True))
            yield total, sum(widths), widths


curves = st.lists(st.integers(0, 6), min_size=1, max_size=6).map(lambda steps: [0, *itertools.accumulate(steps)])


@REPEATABLE
@given(st.lists(curves, min_size=1, max_size=4), st.integers(0, 24), st.integers(1, 4))
def test_allocate_equals_search_over_all_widths(costs: list[list[int]], budget: int, round_to: int):
    assume(budget >= round_to)
    widths = allocate([torch.tensor(cost, dtype=torch.float64) for cost in costs], budget, round_to)
    total, used, _ = min(every_choice(costs, budget, round_to))
    assert sum(widths) <= budget
    assert all(w % round_to == 0 or w == len(c) - 1 for w, c in zip(widths, costs, strict=True))
    assert sum(c[len(c) - 1 - w] for w, c in zip(widths, costs, strict=True)) == total
    assert sum(widths) == used  # of equally good networks the smaller one


def test_allocate_gives_neurons_to_the_block_that_needs_them():
    cheap, dear = torch.arange(9.0), 100 * torch.arange(9.0)
    assert allocate([cheap, dear, cheap], 8, 2) == [0, 8, 0]


def test_allocate_with_the_whole_budget_keeps_everything():
    costs = [torch.arange(8.0), torch.arange(4.0)]  # 7 and 3 neurons, no multiples of 4
    assert allocate(costs, 10, 4) == [7, 3]
    assert allocate(costs, 9, 4) in ([4, 3], [7, 0])  # as good and as small


@pytest.mark.parametrize("budget", [0, 3])
def test_allocate_with_too_small_a_budget_names_both_settings(budget: int):
    with pytest.raises(InfopruneError) as caught:
        allocate([torch.arange(9.0)], budget, 4)
    message = str(caught.value)
    assert "\n" not in message
    assert "ffn.keep_macs" in message
    assert "ffn.round_to = 4" in message
    assert f"{budget} neurons" in message


def test_allocate_with_exactly_one_unit_of_budget_uses_it():
    assert allocate([torch.arange(9.0), 2 * torch.arange(9.0)], 4, 4) == [0, 4]


# ── Any options ──────────────────────────────────────────────────────────────

items = st.lists(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=4
)


@REPEATABLE
@given(items, st.integers(0, 14))
def test_choose_equals_search_over_all_options(options: list[list[tuple[int, int]]], budget: int):
    prices = [[price for price, _ in item] for item in options]
    damages = [[damage for _, damage in item] for item in options]
    chosen = choose(prices, damages, budget)
    every = [
        (sum(d for _, d in picked), sum(p for p, _ in picked))
        for picked in itertools.product(*options)
        if sum(p for p, _ in picked) <= budget
    ]
    if chosen is None:
        assert not every
    else:
        picked = [item[number] for item, number in zip(options, chosen, strict=True)]
        assert (sum(d for _, d in picked), sum(p for p, _ in picked)) == min(every)
