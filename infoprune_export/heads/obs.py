"""Heads by group optimal brain surgeon in the metric of the output gradient, see `models.elimination`.

A head is a group of head_dim inputs of the output projection. The metric makes costs of different blocks, and of heads
and neurons, comparable: all are second-order changes of the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.elimination import Elimination, eliminate
from infoprune_export.models.moments import collect_moments
from infoprune_export.models.vlm import VLM


def eliminate_heads(
    vlm: VLM,
    samples: Sequence[Sample],
    loss: TaskLoss,
    seed: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> list[Elimination]:
    """Every block's elimination of heads, of an unpruned tower."""
    moments = collect_moments(vlm, samples, loss, ("attention",), seed=seed, on_batch=on_batch)["attention"]
    return [
        eliminate(block.attention_out.weight, one.covariance, one.metric, group=block.head_dim)
        for block, one in zip(vlm.tower.blocks, moments, strict=True)
    ]


def scores_of(eliminations: Sequence[Elimination]) -> Tensor:
    """Scores [L, H] whose ranking goes through all blocks' eliminations, cheapest step first.

    A head's score is the cost of its step. A step that is cheaper than one before it in its block waits for that one,
    and so has its score.
    """
    scores = torch.zeros(len(eliminations), len(eliminations[0].order), dtype=torch.float64)
    for row, elimination in zip(scores, eliminations, strict=True):
        row[elimination.order] = elimination.cost.diff().cummax(0).values
    return scores
