"""Carry plans and refitted weights out on a model: the parts that a plan drops are really gone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.tower import VisionTower

# Weights that a plan comes with are named "{block}.{role}.{weight|bias}".
ATTENTION_OUT, FFN_IN, FFN_OUT = "attention_out", "ffn_in", "ffn_out"


def apply_heads(tower: VisionTower, plan: HeadPlan, weights: Mapping[str, Tensor]) -> None:
    """Remove heads in place, then overwrite the output projections that `weights` names.

    Raises:
        InfopruneError: the plan was made for another tower.
    """
    if tower.head_counts() != list(plan.total):
        raise InfopruneError(
            f"head plan is for blocks of {list(plan.total)} heads, the tower has {tower.head_counts()}"
        )
    for block, heads in zip(tower.blocks, plan.kept, strict=True):
        if len(heads) < block.num_heads:
            block.keep_heads(heads)
    _assign(tower, weights)


def apply_ffn(tower: VisionTower, plan: FfnPlan, weights: Mapping[str, Tensor]) -> None:
    """Shrink or replace FFNs in place, then overwrite the projections that `weights` names.

    Raises:
        InfopruneError: the plan was made for another tower.
    """
    widths = [block.ffn_shape.size for block in tower.blocks]
    if widths != list(plan.widths):
        raise InfopruneError(f"FFN plan is for widths {list(plan.widths)}, the tower has {widths}")
    for block, choice in zip(tower.blocks, plan.choices, strict=True):
        if choice.kind == "linear":
            block.make_ffn_linear(choice.rank)
        elif choice.size < block.ffn_shape.size:
            block.keep_neurons(choice.neurons)
    _assign(tower, weights)


@torch.no_grad()
def _assign(tower: VisionTower, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        index, role, kind = name.split(".")
        parameter = getattr(getattr(tower.blocks[int(index)], role), kind)
        if parameter.shape != value.shape:
            raise InfopruneError(f"weight {name} is {list(value.shape)}, the tower needs {list(parameter.shape)}")
        parameter.copy_(value)
