"""Carry plans and refitted weights out on a model: the parts that a plan drops are really gone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.tower import Block, VisionTower

# Weights that a plan comes with are named "{block}.{role}.{weight|bias}"; roles are these and what a block's
# `ffn_projections` has besides.
ATTENTION_OUT, FFN_IN, FFN_OUT = "attention_out", "ffn_in", "ffn_out"
FFN_BYPASS = "ffn_bypass"


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
    assign(tower, weights)


def apply_ffn(tower: VisionTower, plan: FfnPlan, weights: Mapping[str, Tensor]) -> None:
    """Shrink or replace FFNs in place, then overwrite the projections that `weights` names.

    Raises:
        InfopruneError: the plan was made for another tower, or a weight is not of its shape.
    """
    widths = [block.ffn_shape.size for block in tower.blocks]
    if widths != list(plan.widths):
        raise InfopruneError(f"FFN plan is for widths {list(plan.widths)}, the tower has {widths}")
    for block, choice in zip(tower.blocks, plan.choices, strict=True):
        reshape_ffn(block, choice)
    assign(tower, weights)


def reshape_ffn(block: Block, choice: FfnChoice) -> None:
    """Give one block's FFN the chosen shape, in place. What is no part of the original is zero until assigned."""
    if choice.kind == "linear":
        block.make_ffn_linear(choice.rank)
        return
    if choice.size < block.ffn_shape.size:
        block.keep_neurons(choice.neurons)
    if choice.kind == "factored":
        block.make_ffn_factored(choice.ranks)
    elif choice.kind == "bypass":
        block.make_ffn_bypass(choice.rank)


@torch.no_grad()
def assign(tower: VisionTower, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Overwrite the projections that `weights` names; returns them in the tower's dtype."""
    assigned = {}
    for name, value in weights.items():
        index, role, kind = name.split(".")
        block = tower.blocks[int(index)]
        layer = block.attention_out if role == ATTENTION_OUT else block.ffn_projections.get(role)
        if layer is None:
            raise InfopruneError(f"weight {name} is for a part that an FFN of kind {block.ffn_shape.kind} has not")
        parameter = getattr(layer, kind)
        if parameter.shape != value.shape:
            raise InfopruneError(f"weight {name} is {list(value.shape)}, the tower needs {list(parameter.shape)}")
        parameter.copy_(value)
        assigned[name] = parameter.detach().clone()
    return assigned
