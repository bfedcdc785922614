import pytest
import torch

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.models import check_family, tower_of
from infoprune_export.models.tower import FfnShape


def hidden_states(model, pixels, layer):
    return model.model.vision_tower(pixels["pixel_values"], output_hidden_states=True).hidden_states[layer]


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


@pytest.mark.parametrize("kind", ["cls", "received"])
def test_attention_prior_equals_eager_attention(random_vlm, pixels, kind):
    model = random_vlm.model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model.model.vision_tower(pixels["pixel_values"], output_attentions=True).attentions[4].mean(1)
        before_last, _ = random_vlm.tower.run_blocks(random_vlm.tower.embed(pixels))
        actual = random_vlm.tower.attention_prior(before_last, kind)
    expected = attention[:, 0, 1:] if kind == "cls" else attention[:, 1:, 1:].mean(1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


def test_attention_prior_without_heads_is_refused(random_vlm, pixels):
    random_vlm.tower.blocks[-1].keep_heads([])
    with pytest.raises(InfopruneError, match="no attention head left"):
        random_vlm.tower.attention_prior(random_vlm.tower.embed(pixels), "cls")


@pytest.mark.parametrize("kept", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_keep_heads_equals_masking(random_vlm, pixels, kept):
    """Zeroing a head where it enters the output projection is what removal must equal."""
    block = random_vlm.tower.blocks[1]
    mask = torch.zeros(4, 8)
    mask[kept] = 1
    handle = block.attention_out.register_forward_pre_hook(lambda _, args: (args[0] * mask.flatten(),))
    with torch.no_grad():
        expected = random_vlm.tower.features(pixels)
        handle.remove()
        block.keep_heads(kept)
        actual = random_vlm.tower.features(pixels)
    assert block.num_heads == len(kept)
    assert block.attention_out.weight.shape == (32, 8 * len(kept))
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kept", [[], [5], list(range(0, 128, 3))])
def test_keep_neurons_equals_masking(random_vlm, pixels, kept):
    block = random_vlm.tower.blocks[2]
    mask = torch.zeros(128)
    mask[kept] = 1
    handle = block.ffn_out.register_forward_pre_hook(lambda _, args: (args[0] * mask,))
    with torch.no_grad():
        expected = random_vlm.tower.features(pixels)
        handle.remove()
        block.keep_neurons(kept)
        actual = random_vlm.tower.features(pixels)
    assert block.ffn_shape == FfnShape("mlp" if kept else "constant", len(kept))
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_make_ffn_linear_has_no_activation(random_vlm):
    block = random_vlm.tower.blocks[0]
    block.make_ffn_linear(7)
    up, down, bias = torch.randn(7, 32), torch.randn(32, 7), torch.randn(32)
    with torch.no_grad():
        block.ffn_in.weight.copy_(up)
    block.set_ffn_out(down, bias)
    x = torch.randn(2, 5, 32)
    assert block.ffn_shape == FfnShape("linear", 7)
    with torch.no_grad():
        torch.testing.assert_close(block.module.mlp(x), x @ up.T @ down.T + bias)


def test_surgery_keeps_the_dtype(random_vlm):
    random_vlm.model.half()
    block = random_vlm.tower.blocks[0]
    block.keep_heads([1])
    block.keep_neurons([0, 4])
    assert {p.dtype for p in block.module.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vision_feature_select_strategy": "full"}, "supported: default"),
        ({"vision_feature_layer": [-2, -1]}, "several layers"),
        ({"vision_feature_layer": -9}, "outside the tower's 6 blocks"),
    ],
)
def test_unsupported_configurations_are_refused(change, match):
    model = testbed.build_model(layers=6, hidden_size=32, heads=4)
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(InfopruneError, match=match):
        tower_of(model)


def test_unknown_family_is_refused_with_the_supported_ones():
    with pytest.raises(InfopruneError, match=r"'bert'.*supported: llava"):
        check_family("bert")


@pytest.mark.parametrize("shape", [(1, 3, 112, 56), (3, 112, 112), (1, 1, 112, 112)])
def test_inputs_of_the_wrong_size_are_refused(random_vlm, shape):
    with pytest.raises(InfopruneError, match=r"\[batch, 3, 112, 112\]"):
        random_vlm.tower.check_inputs({"pixel_values": torch.zeros(shape)})
