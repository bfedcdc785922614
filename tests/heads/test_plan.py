"""The head plan: what it refuses, and that it survives JSON."""

from __future__ import annotations

import json

import pytest

from infoprune_export.errors import InfopruneError
from infoprune_export.heads.plan import HeadPlan


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
