"""Costs against their definition, and choices against every other choice."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infoprune_export.errors import InfopruneError
from infoprune_export.language.choice import (
    GroupElimination,
    Option,
    check_budget,
    choose,
    head_options,
    neuron_options,
    plan_of,
    random_head_options,
    random_neuron_options,
)
from infoprune_export.language.plan import LayerSize
from infoprune_export.models.elimination import eliminate
from infoprune_export.models.moments import Moments
from infoprune_export.recipe import LanguageSpec

quick = settings(max_examples=20, deadline=None, derandomize=True)


def moments(rng: np.random.Generator, inputs: int, outputs: int) -> Moments:
    x, g = rng.normal(size=(3 * inputs, inputs)), rng.normal(size=(2 * outputs, outputs))
    x *= rng.uniform(0.2, 2, inputs)
    return Moments(torch.from_numpy(x.T @ x / len(x)), torch.from_numpy(g.T @ g / len(g)))


def definition(weight, known: Moments, gone: list[int], damping: float = 1e-4) -> float:
    """The least tr(G dW C dW^T) of all dW that make the columns zero, found by solving for the rest of dW."""
    c = known.covariance + damping * known.covariance.diagonal().mean() * torch.eye(len(known.covariance))
    rest = [i for i in range(len(c)) if i not in gone]
    change = torch.zeros_like(weight)
    change[:, gone] = -weight[:, gone]
    change[:, rest] = weight[:, gone] @ c[gone][:, rest] @ torch.linalg.inv(c[rest][:, rest])
    return float(torch.trace(known.metric @ change @ c @ change.T))


def layer_of(rng: np.random.Generator, heads: int, groups: int, head_dim: int, neurons: int = 8, outputs: int = 6):
    def projection(inputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
        layer.weight = nn.Parameter(torch.from_numpy(rng.normal(size=(outputs, inputs))))
        return layer

    return SimpleNamespace(
        num_heads=heads,
        num_key_value_heads=groups,
        num_neurons=neurons,
        head_dim=head_dim,
        attention_out=projection(heads * head_dim),
        ffn_out=projection(neurons),
    )


# ── Costs ────────────────────────────────────────────────────────────────────


@quick
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_prices_add_up_to_the_cost_of_removing_all_at_once(seed, sizes):
    rng = np.random.default_rng(seed)
    inputs = sum(sizes) + 2
    known, weight = moments(rng, inputs, 5), torch.from_numpy(rng.normal(size=(5, inputs)))
    order = rng.permutation(inputs).tolist()
    groups = [[order.pop() for _ in range(size)] for size in sizes]
    elimination = GroupElimination(weight, known)
    spent, gone = 0.0, []
    for group in groups:
        price = elimination.price(group)
        assert elimination.remove(group) == price >= -1e-9
        spent, gone = spent + price, gone + group
        assert spent == pytest.approx(definition(weight, known, gone), rel=1e-6, abs=1e-9)


@quick
@given(seed=st.integers(0, 10_000))
def test_plain_heads_go_as_the_encoders_do(seed):
    rng = np.random.default_rng(seed)
    layer, known = layer_of(rng, 5, 5, 2), moments(rng, 10, 6)
    options = head_options(layer, known)
    reference = eliminate(layer.attention_out.weight, known.covariance, known.metric, group=2)
    for gone, option in enumerate(options):
        assert option.kept == tuple(sorted(reference.order[gone:].tolist()))
        assert option.size == 2 * (5 - gone)
        assert option.cost == pytest.approx(float(reference.cost[gone]), rel=1e-6, abs=1e-9)
    assert len(options) == 5


@quick
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3), each=st.integers(1, 3))
def test_options_of_grouped_queries(seed, groups, each):
    """One for each number of groups and of queries in each, at its true cost."""
    rng = np.random.default_rng(seed)
    layer = layer_of(rng, groups * each, groups, 2)
    known = moments(rng, 2 * groups * each, 6)
    options = head_options(layer, known)
    found = set()
    for option in options:
        counts = [sum(head // each == group for head in option.kept) for group in range(groups)]
        queries = {count for count in counts if count}
        assert len(queries) == 1
        found.add((sum(count > 0 for count in counts), *queries))
        gone = [2 * h + c for h in range(groups * each) if h not in option.kept for c in range(2)]
        expected = definition(layer.attention_out.weight.detach(), known, gone) if gone else 0.0
        assert option.cost == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert option.size == len(option.kept) + sum(count > 0 for count in counts)
    assert found == set(itertools.product(range(1, groups + 1), range(1, each + 1)))
    assert len(options) == groups * each


def test_the_cheapest_query_of_every_group_leaves_first():
    rng = np.random.default_rng(0)
    layer, known = layer_of(rng, 4, 2, 2), moments(rng, 8, 6)
    # Independent inputs: nothing compensates, so a head costs what it contributes.
    known = Moments(torch.eye(8, dtype=torch.float64), known.metric)
    with torch.no_grad():
        for head, scale in enumerate((5.0, 0.1, 0.2, 4.0)):
            layer.attention_out.weight[:, 2 * head : 2 * head + 2] *= scale
    kept = {len(option.kept): option.kept for option in head_options(layer, known) if option.size == 4}
    assert kept[2] == (0, 3)


@quick
@given(seed=st.integers(0, 10_000), round_to=st.sampled_from([1, 3, 8, 50]))
def test_widths_are_multiples_at_their_true_cost(seed, round_to):
    rng = np.random.default_rng(seed)
    layer, known = layer_of(rng, 2, 1, 2, neurons=8), moments(rng, 8, 6)
    options = neuron_options(layer, known, round_to)
    assert [option.size for option in options] == [*range(round_to, 8, round_to), 8]
    for option in options:
        assert len(option.kept) == option.size
        gone = [i for i in range(8) if i not in option.kept]
        expected = definition(layer.ffn_out.weight.detach(), known, gone) if gone else 0.0
        assert option.cost == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_random_options_are_drawn_alike_and_cost_by_size_alone():
    size = LayerSize(6, 3, 10)
    drawn = [random_head_options(size, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {(len(option.kept), option.size) for option in drawn[0]} == {(1, 2), (2, 4), (3, 6), (2, 3), (4, 6), (6, 9)}
    for option in drawn[0]:
        counts = np.bincount(np.array(option.kept) // 2, minlength=3)
        assert len(set(counts[counts > 0].tolist())) == 1
        assert option.cost == pytest.approx((1 - option.size / 9) ** 2)
    widths = [random_neuron_options(size, np.random.default_rng(seed), 4) for seed in (0, 0, 1)]
    assert widths[0] == widths[1] != widths[2]
    assert [(option.size, option.cost) for option in widths[0]] == [(4, 0.36), (8, pytest.approx(0.04)), (10, 0.0)]


def test_random_takes_as_much_from_every_layer():
    total = [LayerSize(8, 8, 64)] * 3
    rng = np.random.default_rng(0)
    options = ((random_head_options(s, rng), random_neuron_options(s, rng, 8)) for s in total)
    plan = plan_of(total, LanguageSpec(method="random", remove_heads=0.5, keep_macs=0.5, round_to=8), options)
    assert plan.kept == (LayerSize(4, 4, 32),) * 3
    assert len(set(plan.heads)) > 1


# ── Budget ───────────────────────────────────────────────────────────────────


@quick
@given(st.data())
def test_chosen_is_the_cheapest_of_all_combinations(data):
    layers = [
        [
            Option((k,), data.draw(st.integers(1, 6)), float(data.draw(st.integers(0, 9))))
            for k in range(data.draw(st.integers(1, 4)))
        ]
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    budget = data.draw(st.integers(0, 20))
    every = [(sum(o.cost for o in c), sum(o.size for o in c)) for c in itertools.product(*layers)]
    within = [pair for pair in every if pair[1] <= budget]
    if not within:
        with pytest.raises(InfopruneError, match=f"a budget of {budget} is below"):
            choose(layers, budget)
        return
    chosen = choose(layers, budget)
    assert all(option in layer for option, layer in zip(chosen, layers, strict=True))
    assert (sum(o.cost for o in chosen), sum(o.size for o in chosen)) == min(within)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"remove_heads": 0.9}, ("remove_heads = 0.9", "leaves 2 units", "2 layers", "need 4")),
        ({"keep_macs": 0.1}, ("keep_macs = 0.1", "leaves 20 neurons", "need 128", "round_to = 64")),
        ({"keep_macs": 0.9, "round_to": 512}, ("need 200", "round_to = 512")),
    ],
)
def test_budgets_below_the_least_are_refused(spec, named):
    total = [LayerSize(4, 4, 100)] * 2
    with pytest.raises(InfopruneError) as caught:
        check_budget(total, LanguageSpec(method="obs", **spec))
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("remove", "keep", "budget"), [(0.0, 1.0, (18, 40)), (0.3, 0.7, (13, 28)), (0.5, 0.5, (9, 20))]
)
def test_budgets_in_units(remove, keep, budget):
    """What is removed and kept is rounded down, whatever floating point makes of the product."""
    total = [LayerSize(6, 3, 20)] * 2
    assert check_budget(total, LanguageSpec(remove_heads=remove, keep_macs=keep, round_to=4)) == budget
