"""Factored and bypassed FFNs as modules: what they compute, weight by weight, in families with and without a gate."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, build

from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.models.tower import FfnShape


@pytest.fixture(params=FAMILIES)
def block(request):
    return tower_of(build(request.param, blocks=3)).blocks[1]


def randomise(block):
    with torch.no_grad():
        for parameter in block.ffn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))


def by_hand(block, x, products):
    """act(up), or act(gate) * up, then down; `products` are weights and biases by role."""
    up = x @ products["ffn_in"][0].T + products["ffn_in"][1]
    if "ffn_gate" in products:
        hidden = block.activation(x @ products["ffn_gate"][0].T + products["ffn_gate"][1]) * up
    else:
        hidden = block.activation(up)
    return hidden, products["ffn_out"]


def test_projections_of_a_whole_ffn_compute_it(block):
    x = torch.randn(5, 64)
    products = {role: (layer.weight, layer.bias) for role, layer in block.ffn_projections.items()}
    hidden, (weight, bias) = by_hand(block, x, products)
    with torch.no_grad():
        torch.testing.assert_close(block.ffn(x), hidden @ weight.T + bias, rtol=1e-5, atol=1e-5)


def test_factored_ffn_is_the_ffn_of_the_products(block):
    whole, width, count = copy.deepcopy(block.activation), block.ffn_shape.size, len(block.ffn_projections)
    ranks = (5, 6, 7)[-count:]
    block.make_ffn_factored(ranks)
    assert not any(parameter.any() for parameter in block.ffn.parameters())
    assert block.ffn_shape == FfnShape("factored", width, ranks)
    assert type(block.activation) is type(whole)
    randomise(block)
    layers, x = block.ffn_projections, torch.randn(5, 64)
    roles = [role for role in layers if not role.endswith("_factor")]
    assert len(roles) == count
    products = {role: (layers[role].weight @ layers[f"{role}_factor"].weight, layers[role].bias) for role in roles}
    assert layers["ffn_out"].in_features == ranks[-1]
    hidden, (weight, bias) = by_hand(block, x, products)
    with torch.no_grad():
        expected = hidden @ weight.T + bias
        assert (block.ffn(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_bypass_is_added_to_the_neurons(block):
    block.keep_neurons([1, 4, 9])
    x, before = torch.randn(2, 5, 64), block.ffn_projections
    with torch.no_grad():
        pruned = block.ffn(x)
        block.make_ffn_bypass(2)
        assert block.ffn_shape == FfnShape("bypass", 3, (2,))
        torch.testing.assert_close(block.ffn(x), pruned, rtol=1e-6, atol=1e-6)
        layers = block.ffn_projections
        assert torch.equal(layers["ffn_in"].weight, before["ffn_in"].weight)
        layers["ffn_bypass"].weight.normal_()
        layers["ffn_out"].weight[:, 3:].normal_()
        path = x @ layers["ffn_bypass"].weight.T @ layers["ffn_out"].weight[:, 3:].T
        torch.testing.assert_close(block.ffn(x), pruned + path, rtol=1e-4, atol=1e-4)


def test_kinds_stay_in_dtype_and_frozen(block):
    block.module.to(torch.bfloat16)
    bypassed = copy.deepcopy(block)
    block.make_ffn_factored((3,) * len(block.ffn_projections))
    bypassed.keep_neurons([0])
    bypassed.make_ffn_bypass(2)
    for one in (block, bypassed):
        assert {parameter.dtype for parameter in one.ffn.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in one.ffn.parameters())


@pytest.mark.parametrize("kind", ["factored", "bypass"])
def test_neurons_of_another_kind_cannot_be_taken_out(block, kind):
    if kind == "factored":
        block.make_ffn_factored((3,) * len(block.ffn_projections))
    else:
        block.make_ffn_bypass(2)
    with pytest.raises(InfopruneError, match=f"no neurons can be taken out of a {kind} FFN"):
        block.keep_neurons([0])
