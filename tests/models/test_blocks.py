"""Surgery on one block of every family, and what a tower refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, QWEN, build, own_features, relative_error, seeded

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.models import FAMILIES as MODEL_TYPES
from infoprune_export.models import check_family, tower_of
from infoprune_export.models.tower import FfnShape


@pytest.fixture(params=FAMILIES)
def tower(request):
    return tower_of(build(request.param))


def hidden_states(model, pixels, layer):
    return model.model.vision_tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[layer]


# ── Feature layer ──


@pytest.mark.parametrize("layer", [-1, -2, 3])
def test_features_equal_hugging_face_for_any_feature_layer(random_vlm, pixels, layer):
    model = random_vlm.model
    model.config.vision_feature_layer = layer
    with torch.no_grad():
        expected = model.model.multi_modal_projector(hidden_states(model, pixels, layer)[:, 1:])
        actual = tower_of(model).features(pixels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_unused_block_is_no_part_of_the_tower(random_vlm):
    assert len(random_vlm.tower.blocks) == 5
    assert len(random_vlm.model.model.vision_tower.encoder.layers) == 6


# ── Surgery ──


def masked_features(tower, inputs, projection, kept):
    """Features while everything but `kept` is zeroed where it enters `projection`: what removal must equal."""
    mask = torch.zeros(projection.in_features)
    mask[kept] = 1
    handle = projection.register_forward_pre_hook(lambda _, args: (args[0] * mask,))
    with torch.no_grad():
        features = tower.features_of(inputs)
    handle.remove()
    return features


@pytest.mark.parametrize("kept", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_keep_heads_equals_masking(tower, kept):
    inputs = tower.example_inputs(2, seeded())
    block = tower.blocks[1]
    channels = [head * block.head_dim + channel for head in kept for channel in range(block.head_dim)]
    expected = masked_features(tower, inputs, block.attention_out, channels)
    block.keep_heads(kept)
    with torch.no_grad():
        actual = tower.features_of(inputs)
    assert block.num_heads == len(kept)
    assert block.attention_out.weight.shape == (64, 16 * len(kept))
    assert relative_error(actual, expected) <= 1e-5
    assert relative_error(torch.cat(own_features(tower.model, inputs)), expected.flatten(0, 1)) <= 1e-5


@pytest.mark.parametrize("kept", [[], [5], list(range(0, 96, 3))])
def test_keep_neurons_equals_masking(tower, kept):
    inputs = tower.example_inputs(2, seeded())
    block = tower.blocks[2]
    expected = masked_features(tower, inputs, block.ffn_out, kept)
    block.keep_neurons(kept)
    with torch.no_grad():
        actual = tower.features_of(inputs)
    assert block.ffn_shape == FfnShape("mlp" if kept else "constant", len(kept))
    assert relative_error(actual, expected) <= 1e-5
    assert relative_error(torch.cat(own_features(tower.model, inputs)), expected.flatten(0, 1)) <= 1e-5


def test_make_ffn_linear_has_no_activation(tower):
    block = tower.blocks[0]
    block.make_ffn_linear(7)
    up, down, bias = torch.randn(7, 64), torch.randn(64, 7), torch.randn(64)
    with torch.no_grad():
        block.ffn_in.weight.copy_(up)
    block.set_ffn_out(down, bias)
    x = torch.randn(2, 5, 64)
    assert block.ffn_shape == FfnShape("linear", 7)
    with torch.no_grad():
        torch.testing.assert_close(block.module.mlp(x), x @ up.T @ down.T + bias, rtol=1e-5, atol=1e-5)


def test_a_new_linear_ffn_is_zero_until_it_is_assigned(tower):
    block = tower.blocks[0]
    block.make_ffn_linear(7)
    assert not any(parameter.any() for parameter in block.module.mlp.parameters())


def test_surgery_twice_equals_surgery_once(tower):
    """What is kept of what was kept, down to nothing and past it."""
    inputs = tower.example_inputs(1, seeded())
    other = tower_of(copy.deepcopy(tower.model))
    tower.blocks[1].keep_heads([0, 2, 3])
    tower.blocks[1].keep_heads([1, 2])
    tower.blocks[0].keep_neurons(range(50))
    tower.blocks[0].keep_neurons([0, 49])
    other.blocks[1].keep_heads([2, 3])
    other.blocks[0].keep_neurons([0, 49])
    with torch.no_grad():
        assert torch.equal(tower.features_of(inputs), other.features_of(inputs))
        for one in (tower, other):
            one.blocks[1].keep_heads([])
            one.blocks[0].keep_neurons([])
        tower.blocks[1].keep_heads([])
        tower.blocks[0].keep_neurons([])
        assert torch.equal(tower.features_of(inputs), other.features_of(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_surgery_keeps_the_dtype(tower, dtype):
    tower.model.to(dtype)
    tower.blocks[0].keep_heads([1])
    tower.blocks[0].keep_neurons([0, 4])
    tower.blocks[1].keep_heads([])
    tower.blocks[1].keep_neurons([])
    tower.blocks[2].make_ffn_linear(3)
    for block in tower.blocks[:3]:
        assert {p.dtype for p in block.module.parameters()} == {dtype}


def test_surgery_leaves_no_gradients_switched_on(tower):
    """A model that was loaded for inference stays one."""
    tower.blocks[0].keep_heads([1])
    tower.blocks[0].keep_neurons([0, 4])
    tower.blocks[1].keep_heads([])
    tower.blocks[1].keep_neurons([])
    tower.blocks[2].make_ffn_linear(3)
    assert not any(parameter.requires_grad for parameter in tower.model.parameters())


def test_removed_parts_free_their_memory(tower):
    def size(block):
        return sum(parameter.numel() for parameter in block.module.parameters())

    block = tower.blocks[0]
    before, width, ffn_inputs = size(block), block.ffn_shape.size, len(block._names.ffn_in)
    block.keep_heads([1, 2])
    block.keep_neurons(range(0, width, 2))
    heads = 2 * 16 * (4 * 64 + 3)
    neurons = width // 2 * (ffn_inputs * 65 + 64)
    assert size(block) == before - heads - neurons
    block.keep_heads([])
    block.keep_neurons([])
    norms = sum(p.numel() for name in ("attention_norm", "ffn_norm") for p in norm(block, name).parameters())
    assert size(block) == norms + 2 * 64


def norm(block, role):
    return getattr(block.module, getattr(block._names, role))


# ── Refusals ──


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vision_feature_select_strategy": "full"}, "supported: default"),
        ({"vision_feature_layer": [-2, -1]}, "several layers"),
        ({"vision_feature_layer": -9}, "outside the tower's 6 blocks"),
        ({"vision_feature_layer": 0}, "outside the tower's 6 blocks"),
        ({"vision_feature_layer": 7}, "outside the tower's 6 blocks"),
    ],
)
def test_unsupported_configurations_are_refused(change, match):
    model = testbed.build_model(layers=6, hidden_size=32, heads=4)
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(InfopruneError, match=match):
        tower_of(model)


def test_siglip_with_clips_strategy_is_refused():
    model = build("llava-siglip")
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(InfopruneError, match="supported: full"):
        tower_of(model)


def test_llava_with_an_unknown_vision_tower_is_refused():
    model = build("llava")
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(InfopruneError, match="'pixtral' is not supported; supported: clip_vision_model"):
        tower_of(model)


def test_an_unknown_tile_packing_is_refused():
    model = build("llava-next")
    model.config.image_packing = "spiral"
    with pytest.raises(InfopruneError, match="'spiral': supported are anyres, tiles"):
        tower_of(model)


def test_unknown_family_is_refused_with_the_supported_ones():
    with pytest.raises(InfopruneError, match=r"'bert'.*supported: llava"):
        check_family("bert")


def test_every_adapter_has_a_random_model():
    assert {build(name).config.model_type for name in FAMILIES} == set(MODEL_TYPES)


@pytest.mark.parametrize("shape", [(1, 3, 112, 56), (3, 112, 112), (1, 1, 112, 112)])
def test_inputs_of_the_wrong_size_are_refused(random_vlm, shape):
    with pytest.raises(InfopruneError, match=r"\[batch, 3, 112, 112\]"):
        random_vlm.tower.check_inputs({"pixel_values": torch.zeros(shape)})


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize(
    ("pixels", "grid", "match"),
    [
        ((16, 294), None, "image_grid_thw is missing"),
        ((16, 293), [[1, 4, 4]], r"takes \[patches, 294\]"),
        ((1, 16, 294), [[1, 4, 4]], r"takes \[patches, 294\]"),
        ((20, 294), [[1, 4, 5]], "grid of 1 x 4 x 5 patches; .* multiples of 2"),
        ((16, 294), [[1, 4, 4], [1, 4, 4]], "16 patches, image_grid_thw stands for 32"),
        ((0, 294), [[1, 0, 4]], "grid of 1 x 0 x 4 patches"),
    ],
)
def test_packed_inputs_that_do_not_fit_are_refused(name, pixels, grid, match):
    inputs = {"pixel_values": torch.zeros(pixels)}
    if grid is not None:
        inputs["image_grid_thw"] = torch.tensor(grid)
    with pytest.raises(InfopruneError, match=match):
        tower_of(build(name)).check_inputs(inputs)


@pytest.mark.parametrize(
    ("pixels", "sizes", "match"),
    [
        ((1, 5, 3, 56, 56), None, "image_sizes is missing"),
        ((2, 5, 3, 56, 56), [[112, 112]], r"\[2, 5, 3, 56, 56\] with 1 image sizes: .*\[images, tiles, 3, 56, 56\]"),
        ((1, 5, 3, 56, 28), [[112, 112]], r"takes \[images, tiles, 3, 56, 56\]"),
        ((5, 3, 56, 56), [[112, 112]], r"takes \[images, tiles, 3, 56, 56\]"),
        ((2, 4, 3, 56, 56), [[56, 112], [112, 112]], "4 tiles per image, image_sizes stands for 5"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(pixels, sizes, match):
    inputs = {"pixel_values": torch.zeros(pixels)}
    if sizes is not None:
        inputs["image_sizes"] = torch.tensor(sizes)
    with pytest.raises(InfopruneError, match=match):
        tower_of(build("llava-next")).check_inputs(inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_example_inputs_pass_the_check(name):
    tower = tower_of(build(name))
    for images in (1, 2, 3, 4):
        tower.check_inputs(tower.example_inputs(images, seeded()))
