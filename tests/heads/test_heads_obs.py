"""Group optimal brain surgeon: the ranking it gives, and what goes first."""

from __future__ import annotations

import torch

from infoprune_export.heads.obs import eliminate_heads, scores_of
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.elimination import Elimination
from infoprune_export.models.vlm import writable_copy


def test_ranking_goes_through_every_block_in_its_own_order():
    first = Elimination(torch.tensor([2, 0, 1]), torch.tensor([0.0, 1.0, 1.5, 9.0]).double())
    second = Elimination(torch.tensor([1, 2, 0]), torch.tensor([0.0, 0.7, 3.0, 4.0]).double())
    scores = scores_of([first, second])
    ranked = scores.flatten().argsort(stable=True).tolist()
    assert ranked[:3] == [4, 0, 2] or ranked[:3] == [4, 2, 0]  # .7, then the first block's 1 and what waits for it
    assert scores[0].tolist() == [1.0, 7.5, 1.0]
    assert scores[1, 1] < scores[1, 2] <= scores[1, 0]


def test_a_silent_head_goes_first_and_a_loud_one_last(trained_vlm, scene_split):
    changed = writable_copy(trained_vlm)
    block = changed.tower.blocks[1]
    width = block.head_dim
    with torch.no_grad():
        block.attention_out.weight[:, 3 * width : 4 * width] = 0.0
        block.attention_out.weight[:, 5 * width : 6 * width] *= 20.0
    loss = TaskLoss(True, trained_vlm.tower)
    elimination = eliminate_heads(changed, scene_split.calibration[:8], loss, seed=0)[1]
    assert int(elimination.order[0]) == 3
    assert elimination.cost[1] < 1e-9 * elimination.cost[-1]
    assert int(elimination.order[-1]) == 5


def test_copies_of_one_head_leave_one_by_one(trained_vlm, scene_split):
    """The second of two copies costs what the head is worth."""
    changed = writable_copy(trained_vlm)
    block = changed.tower.blocks[2]
    width = block.head_dim
    rows = torch.arange(width)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(block.module.self_attn, name)
            projection.weight[6 * width + rows] = projection.weight[1 * width + rows]
            projection.bias[6 * width + rows] = projection.bias[1 * width + rows]
    loss = TaskLoss(True, trained_vlm.tower)
    elimination = eliminate_heads(changed, scene_split.calibration[:8], loss, seed=0)[2]
    assert int(elimination.order[0]) in (1, 6)
    assert elimination.cost[1] < 0.1 * (elimination.cost[2] - elimination.cost[1])
