"""The head plan: what it refuses, that it survives JSON, and how scores become one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.errors import InfopruneError
from infoprune_export.heads.plan import HeadPlan, plan_heads
from infoprune_export.recipe import HeadsSpec


def test_head_plan_survives_json():
    plan = HeadPlan((4, 4, 4), ((0, 3), (), (0, 1, 2, 3)))
    assert HeadPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_removed_fraction_counts_heads_over_all_blocks():
    assert HeadPlan((4, 4, 2), ((0, 3), (), (1,))).removed_fraction == pytest.approx(0.7)


def test_full_plan_removes_nothing():
    plan = HeadPlan.full([3, 1])
    assert plan.kept == ((0, 1, 2), (0,))
    assert plan.removed_fraction == 0.0


@pytest.mark.parametrize("heads", [(1, 0), (0, 0), (0, 4), (-1, 2), (4,)])
def test_impossible_heads_are_refused_with_block_and_range(heads: tuple[int, ...]):
    with pytest.raises(InfopruneError, match=r"^head plan, block 1: .* is no ascending choice of 0\.\.3$"):
        HeadPlan((4, 4), ((0,), heads))


@pytest.mark.parametrize("kept", [((0,),), ((0,), (0,), (0,))])
def test_plan_of_wrong_length_is_refused(kept: tuple[tuple[int, ...], ...]):
    with pytest.raises(InfopruneError, match=f"{len(kept)} blocks of heads for 2 blocks"):
        HeadPlan((4, 4), kept)


def test_from_dict_checks_like_the_constructor():
    with pytest.raises(InfopruneError, match="block 0"):
        HeadPlan.from_dict({"total": [2], "kept": [[1, 0]]})


# ── From scores ──────────────────────────────────────────────────────────────

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=60)


def budgeted(remove: float) -> HeadsSpec:
    return HeadsSpec(method="budgeted", remove=remove)


def paper(threshold: float = 0.5) -> HeadsSpec:
    return HeadsSpec(method="paper", threshold=threshold)


# ── Paper ────────────────────────────────────────────────────────────────────


def test_paper_keeps_gates_of_at_least_the_threshold():
    zeta = torch.tensor([[0.0, -0.01, 0.01], [-3.0, 3.0, -0.01]])
    assert plan_heads(zeta, paper()).kept == ((0, 2), (1,))  # a gate of exactly .5 stays


def test_paper_threshold_is_on_gates_and_not_on_zeta():
    zeta = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]])  # gates .27, .12, .27, .5
    assert plan_heads(zeta, paper(0.2)).kept == ((0,), (0, 1))
    assert plan_heads(zeta, paper(0.4)).kept == ((), (1,))


def test_paper_below_threshold_everywhere_keeps_the_last_blocks_best_head():
    zeta = torch.tensor([[-1.0, -2.0, -3.0], [-9.0, -7.0, -8.0]])
    assert plan_heads(zeta, paper()).kept == ((), (1,))


# ── Budgeted ─────────────────────────────────────────────────────────────────


@REPEATABLE
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0, 0.999), st.integers(0, 10**6))
def test_budgeted_keeps_the_budget_and_the_largest_gates(blocks: int, heads: int, remove: float, seed: int):
    zeta = torch.rand(blocks, heads, generator=torch.Generator().manual_seed(seed))
    plan = plan_heads(zeta, budgeted(remove))
    total = blocks * heads
    expected = total - int(total * remove + 0.5)  # half a head rounds towards removal
    kept = [zeta[b, h].item() for b, row in enumerate(plan.kept) for h in row]
    gone = [zeta[b, h].item() for b in range(blocks) for h in range(heads) if h not in plan.kept[b]]
    assert plan.total == (heads,) * blocks
    assert len(kept) == max(1, expected)
    assert plan.kept[-1]
    best_last = zeta[-1].max().item()
    # At most the last block's best head may stand before a larger one.
    kept.remove(best_last)
    assert not kept or not gone or min(kept) >= max(gone) or best_last < max(gone)


def test_budgeted_rounds_half_a_head_towards_removal():
    zeta = torch.tensor([[5.0, 4.0, 3.0, 2.0, 6.0]])
    assert plan_heads(zeta, budgeted(0.5)).kept == ((0, 4),)
    assert plan_heads(zeta, budgeted(0.29)).kept == ((0, 1, 2, 4),)


def test_budgeted_of_nothing_keeps_all():
    assert plan_heads(torch.randn(3, 4), budgeted(0.0)).removed_fraction == 0.0


def test_budgeted_may_empty_a_block_other_than_the_last():
    zeta = torch.tensor([[0.0, 0.1], [5.0, 6.0], [7.0, 8.0]])
    assert plan_heads(zeta, budgeted(0.34)).kept == ((), (0, 1), (0, 1))


def test_budgeted_last_block_takes_the_place_of_the_weakest_kept_head():
    zeta = torch.tensor([[5.0, 3.0, 4.0], [9.0, 8.0, 7.0], [0.1, 0.2, 0.0]])
    plan = plan_heads(zeta, budgeted(4 / 9))
    assert plan.kept == ((0,), (0, 1, 2), (1,))  # without the rule block 0 would keep head 2 too


def test_budgeted_single_place_goes_to_the_last_block():
    zeta = torch.tensor([[5.0, 3.0], [0.0, 1.0]])
    assert plan_heads(zeta, budgeted(0.75)).kept == ((), (1,))
    assert plan_heads(zeta, budgeted(0.99)).kept == ((), (1,))


def test_budgeted_ties_go_to_the_lowest_index():
    assert plan_heads(torch.full((2, 4), 3.0), budgeted(0.25)).kept == ((0, 1, 2, 3), (0, 1))


def test_budgeted_ties_of_many_heads_are_stable():
    # sorts of more than a handful of elements are where an unstable one shows
    zeta = torch.zeros(24, 16)
    zeta[-1, 3] = 1.0
    kept = plan_heads(zeta, budgeted(0.5)).kept
    assert kept[:11] == (tuple(range(16)),) * 11
    assert kept[11] == tuple(range(15))
    assert kept[12:] == ((),) * 11 + ((3,),)


def test_last_block_ties_go_to_its_lowest_head():
    zeta = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert plan_heads(zeta, paper(0.9)).kept == ((), (0,))
    plan = plan_heads(zeta, budgeted(0.5))
    assert plan.kept[1] == (0,)
    assert len(plan.kept[0]) == 2


@pytest.mark.parametrize("spec", [paper(), budgeted(0.5)], ids=["paper", "budgeted"])
def test_plan_heads_leaves_scores_alone(spec: HeadsSpec):
    zeta = torch.tensor([[5.0, 3.0], [-2.0, -1.0]])
    before = zeta.clone()
    plan_heads(zeta, spec)
    assert torch.equal(zeta, before)
    assert not math.isinf(float(zeta.max()))


# ── Switches ─────────────────────────────────────────────────────────────────


def test_paper_chooses_by_budget_and_budgeted_by_threshold_where_asked_to():
    zeta = torch.tensor([[3.0, -1.0], [2.0, 1.0]])
    assert plan_heads(zeta, HeadsSpec(method="paper", choose="budget", remove=0.5)).kept == ((0,), (0,))
    assert plan_heads(zeta, HeadsSpec(method="budgeted", choose="threshold", remove=0.5)).kept == ((0,), (0, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused_with_their_count(bad: float):
    with pytest.raises(InfopruneError, match="1 of 4 head scores are not finite"):
        plan_heads(torch.tensor([[1.0, bad], [0.0, 2.0]]), budgeted(0.5))
