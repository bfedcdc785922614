"""A small VLM whose biases are not zero, and its FFNs seen directly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infoprune_export.data import testbed
from infoprune_export.data.samples import Sample
from infoprune_export.models import tower_of
from infoprune_export.models.calibration import TaskLoss, captured_input, inputs_of
from infoprune_export.models.vlm import VLM

FEATURES, NEURONS, BLOCKS = 32, 128, 3


@torch.no_grad()
def small_vlm() -> VLM:
    """3 executed blocks of 32 features and 128 neurons whose activations are far from linear."""
    model = testbed.build_model(layers=4, hidden_size=FEATURES, heads=4, seed=3).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    vlm = VLM(model, testbed.build_processor(), tower_of(model))
    for block in vlm.tower.blocks:
        for layer in block.ffn_projections.values():
            layer.bias.normal_(std=0.3, generator=generator)
            layer.weight.normal_(std=1.5 * layer.in_features**-0.5, generator=generator)
    return vlm


def unlabelled(vlm: VLM) -> TaskLoss:
    return TaskLoss(False, vlm.tower)


@torch.no_grad()
def features(vlm: VLM, samples: Sequence[Sample]) -> Tensor:
    return vlm.tower.features_of(inputs_of(vlm, samples))


@torch.no_grad()
def ffn_data(vlm: VLM, samples: Sequence[Sample], index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input [n, D], neurons [n, m] and output [n, D] of a block's FFN, float64."""
    block = vlm.tower.blocks[index]
    with captured_input(block.ffn) as inputs, captured_input(block.ffn_out) as hidden:
        features(vlm, samples)
        x, h = inputs().flatten(0, -2), hidden().flatten(0, -2)
        return x.double(), h.double(), block.ffn(x).double()
