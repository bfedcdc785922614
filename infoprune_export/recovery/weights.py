"""What recovery trains: every parameter of a tower's blocks, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models.tower import VisionTower


def block_parameters(tower: VisionTower) -> dict[str, nn.Parameter]:
    """``blocks.{block}.{name}`` to the parameter; empty ones, which stand for what is gone, are left out."""
    return {
        f"blocks.{number}.{name}": parameter
        for number, block in enumerate(tower.blocks)
        for name, parameter in block.module.named_parameters()
        if parameter.numel()
    }


@torch.no_grad()
def apply_recovery(tower: VisionTower, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the parameters of a tower whose plans are carried out, in place; without weights nothing is done.

    Raises:
        InfopruneError: the weights were trained on a tower of another structure.
    """
    if not weights:
        return
    parameters = block_parameters(tower)
    wanted, found = ({name: list(t.shape) for name, t in side.items()} for side in (parameters, weights))
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InfopruneError(
                f"recovered weight {name} is {found.get(name, 'missing')}, the tower has {wanted.get(name, 'none')}; "
                "it was trained on another tower, run the recovery stage again"
            )
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
