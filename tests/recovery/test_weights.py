"""What recovery's file holds, and towers that it does not belong to."""

from __future__ import annotations

import pytest
import torch

from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import writable_copy
from infoprune_export.recovery.weights import apply_recovery, block_parameters


@pytest.fixture
def pruned(random_vlm):
    vlm = writable_copy(random_vlm)
    vlm.tower.blocks[0].keep_heads([])
    vlm.tower.blocks[1].keep_neurons(range(3))
    return vlm


def drawn(vlm) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator) for name, p in block_parameters(vlm.tower).items()}


def test_every_parameter_of_the_blocks_has_its_name(pruned):
    named = block_parameters(pruned.tower)
    assert named["blocks.1.mlp.fc1.weight"].shape == (3, 32)
    assert named["blocks.0.self_attn.out_proj.bias"].shape == (32,)
    assert "blocks.0.self_attn.out_proj.weight" not in named, "it is empty"
    everything = {id(p) for block in pruned.tower.blocks for p in block.module.parameters() if p.numel()}
    assert {id(parameter) for parameter in named.values()} == everything


def test_weights_are_carried_out(pruned, random_vlm):
    weights = drawn(pruned)
    outside = random_vlm.model.lm_head.weight.clone()
    apply_recovery(pruned.tower, weights)
    assert all(torch.equal(p, weights[name]) for name, p in block_parameters(pruned.tower).items())
    assert torch.equal(pruned.model.lm_head.weight, outside)


def test_no_weights_change_nothing(pruned):
    before = {name: p.clone() for name, p in block_parameters(pruned.tower).items()}
    apply_recovery(pruned.tower, {})
    assert all(torch.equal(p, before[name]) for name, p in block_parameters(pruned.tower).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc1.bias": None}, r"blocks.1.mlp.fc1.bias is missing, the tower has \[3\]"),
        ({"blocks.9.mlp.fc1.bias": (4,)}, r"blocks.9.mlp.fc1.bias is \[4\], the tower has none"),
        ({"blocks.1.mlp.fc1.bias": (4,)}, r"blocks.1.mlp.fc1.bias is \[4\], the tower has \[3\]"),
    ],
)
def test_weights_of_another_tower_are_refused_and_nothing_is_changed(pruned, change, message):
    before = {name: p.clone() for name, p in block_parameters(pruned.tower).items()}
    weights = drawn(pruned)
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    with pytest.raises(InfopruneError, match=message):
        apply_recovery(pruned.tower, weights)
    assert all(torch.equal(p, before[name]) for name, p in block_parameters(pruned.tower).items())
