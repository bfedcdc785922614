"""Every family's tower against the Hugging Face model it is a view of."""

from __future__ import annotations

import sys

import pytest
import torch
from families import FAMILIES, QWEN, build, own_features, relative_error, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Form, image_noise

BAR = 1e-5

# Visual tokens are 2 x 2 patches and windows 4 x 4 visual tokens.
IMAGES = {
    "one window": [(1, 8, 8)],
    "whole windows": [(1, 16, 8)],
    "ragged windows": [(1, 18, 14)],
    "smallest": [(1, 2, 2)],
    "one row": [(1, 2, 64)],
    "one column": [(1, 50, 2)],
    "two sizes": [(1, 16, 16), (1, 6, 10)],
    "three sizes": [(1, 4, 30), (1, 10, 10), (1, 12, 2)],
}
VIDEOS = {"video": [(3, 6, 10)], "video between images": [(1, 4, 4), (3, 4, 6), (1, 18, 2)]}

# Height and width in pixels; tiles are 56 wide, and the grids are 1x2, 2x1, 2x2, 3x1 and 1x3 tiles.
SIZES = {
    "filled grid": [(112, 112)],
    "padded at the sides": [(112, 66)],
    "padded above": [(67, 112)],
    "wide strip": [(20, 300)],
    "tall strip": [(500, 30)],
    "three grids": [(56, 112), (112, 112), (90, 31)],
    "tiny": [(3, 5)],
    "large": [(1234, 987)],
}


@pytest.fixture(scope="module")
def towers():
    return {name: tower_of(build(name)) for name in FAMILIES}


def tiles(sizes, seed=0):
    """LLaVA-NeXT inputs as its processor makes them: every image padded to the largest number of tiles."""
    count = 5
    noise = image_noise(len(sizes) * count, 56, 56, seeded(seed)).unflatten(0, (len(sizes), count))
    return {"pixel_values": noise, "image_sizes": torch.tensor(sizes)}


@torch.no_grad()
def assert_features_equal(tower, inputs):
    tower.check_inputs(inputs)
    images = own_features(tower.model, inputs)
    assert [layout.ids.shape[1] for layout in tower.layouts(inputs)] == [len(image) for image in images]
    together = tower.features_of(inputs)
    assert relative_error(together.flatten(0, 1), torch.cat(images)) <= BAR
    one = Form(several=False)
    if tower.ragged:
        singles = [tower.features(planned)[0] for planned in tower.calls(inputs, one)]
        assert len(singles) == len(images)
        for single, image in zip(singles, images, strict=True):
            assert relative_error(single, image) <= BAR


# ── Features ──


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_example_inputs_equal_hugging_face(towers, name, images):
    tower = towers[name]
    assert_features_equal(tower, tower.example_inputs(images, seeded(images)))


@pytest.mark.parametrize("grids", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("name", QWEN)
def test_features_of_any_grid_equal_hugging_face(towers, name, grids):
    tower = towers[name]
    assert_features_equal(tower, tower.grid_inputs(grids, seeded()))


@pytest.mark.parametrize("grids", VIDEOS.values(), ids=VIDEOS)
@pytest.mark.parametrize("name", QWEN)
def test_frames_attend_to_themselves_only_as_in_hugging_face(towers, name, grids):
    tower = towers[name]
    inputs = tower.grid_inputs(grids, seeded())
    with torch.no_grad():
        actual = tower.features_of(inputs)[0]
    assert relative_error(actual, torch.cat(own_features(tower.model, inputs))) <= BAR


@pytest.mark.parametrize("name", QWEN)
def test_an_encoder_for_one_image_refuses_several_and_videos(towers, name):
    tower = towers[name]
    for grids in (IMAGES["two sizes"], VIDEOS["video"]):
        with pytest.raises(InfopruneError, match="takes one image per call"):
            tower.plan(tower.grid_inputs(grids, seeded()), Form(several=False))


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    name=st.sampled_from(QWEN),
    grids=st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)).map(lambda g: (g[0], 2 * g[1], 2 * g[2])),
        min_size=1,
        max_size=3,
    ),
)
def test_features_of_drawn_grids_equal_hugging_face(towers, name, grids):
    tower = towers[name]
    inputs = tower.grid_inputs(grids, seeded(3))
    with torch.no_grad():
        actual = tower.features_of(inputs)[0]
    assert relative_error(actual, torch.cat(own_features(tower.model, inputs))) <= BAR


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_tiles_are_packed_as_in_hugging_face(towers, sizes):
    assert_features_equal(towers["llava-next"], tiles(sizes))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700))
def test_packing_order_equals_hugging_face_for_any_image_size(towers, height, width):
    """Tiles whose features are their own number show where every one of them went."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tower = towers["llava-next"]
    count = image_size_to_num_patches([height, width], tower.model.config.image_grid_pinpoints, 56)
    numbers = torch.arange(count * 16.0).view(count, 16, 1)
    expected, _ = tower.model.model.pack_image_features(
        [numbers], torch.tensor([[height, width]]), "default", image_newline=torch.tensor([-1.0])
    )
    planned = tower.plan(tiles([(height, width)]), Form())
    order = planned["token_order"]
    assert len(planned["pixel_values"]) == count
    assert torch.where(order == count * 16, -1, order).tolist() == expected[0][:, 0].long().tolist()


def test_all_tiles_without_newlines_in_the_papers_layout():
    """A 2 x 2 grid of a tower with n tokens gives 5 n, as in the token pruning literature."""
    model = build("llava-next")
    expected = own_features(model, tiles([(112, 112)]))[0]
    model.config.image_packing = "tiles"
    tower = tower_of(model)
    inputs = tiles([(112, 112), (40, 112)])
    lengths = [layout.ids.shape[1] for layout in tower.layouts(inputs)]
    assert lengths == [5 * 16, 3 * 16]
    with torch.no_grad():
        features = tower.features_of(inputs)[0]
    # The same vectors: the overview first, then every token of the tiles, newlines aside.
    assert relative_error(features[:16], expected[:16]) <= BAR
    plane = expected[16:].view(8, 9, -1)[:, :8].unflatten(0, (2, 4)).unflatten(2, (2, 4))
    assert relative_error(features[16:80], plane.permute(0, 2, 1, 3, 4).flatten(0, 3)) <= BAR


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_features_are_close_and_half(name):
    full, half = tower_of(build(name)), tower_of(build(name).half())
    inputs = full.example_inputs(2, seeded())
    with torch.no_grad():
        expected = full.features_of(inputs)
        actual = half.features_of({k: v.half() if v.is_floating_point() else v for k, v in inputs.items()})
    assert actual.dtype == torch.float16
    assert (actual.float() - expected).square().mean().sqrt() <= 5e-2 * expected.square().mean().sqrt()


@pytest.mark.parametrize(
    ("key", "value"), [("fullatt_block_indexes", [0, 1, 2, 3]), ("window_size", 28), ("fullatt_block_indexes", [3])]
)
def test_comparison_notices_a_wrong_window(towers, key, value):
    """The bar must be able to fail: attention is not so uniform that its confines do not show."""
    tower = towers["qwen2.5-vl"]
    inputs = tower.grid_inputs([(1, 18, 14)], seeded())
    expected = own_features(tower.model, inputs)[0]
    model = build("qwen2.5-vl")
    setattr(model.config.vision_config, key, value)
    with torch.no_grad():
        assert relative_error(tower_of(model).features_of(inputs)[0], expected) > 100 * BAR


# ── Structure of a plan ──


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", [Form(), Form(several=False), Form(several=False, selecting=True)])
def test_every_planned_tensor_has_its_dynamic_extents(towers, name, form):
    tower = towers[name]
    first, second = (tower.calls(tower.example_inputs(images, seeded()), form)[-1] for images in (1, 2))
    shapes = tower.dynamic_shapes(form)
    assert list(first) == list(second) == list(shapes)
    for key, value in first.items():
        for axis in range(value.dim()):
            assert axis in shapes[key] or value.shape[axis] == second[key].shape[axis], (key, axis)


@pytest.mark.parametrize("name", FAMILIES)
def test_split_images_are_the_batch(towers, name):
    tower = towers[name]
    inputs = tower.example_inputs(3, seeded())
    singles = tower.split(inputs)
    assert len(singles) == 3
    for key, value in inputs.items():
        assert torch.equal(torch.cat([one[key] for one in singles]), value)


# ── Token priors ──


@pytest.mark.parametrize("name", FAMILIES)
def test_received_attention_equals_hugging_faces_own_weights(towers, name, monkeypatch):
    """Mean over the visual tokens' rows of what each of them is given, as eager attention computes it."""
    tower = towers[name]
    inputs = tower.example_inputs(1, seeded(4))
    weights = last_attention(tower, inputs, monkeypatch).mean(1)
    special = 1 if "cls" in tower.priors else 0
    received = weights[:, special:, special:].mean(1)
    form = Form(several=False, selecting=True)
    planned = tower.calls(inputs, form)[0]
    with torch.no_grad():
        stream, context = tower.embed(planned)
        prior = tower.attention_prior(tower.run_blocks(stream, context), context, planned, "received")
    if name == "llava-next":
        received = received.flatten()[planned["token_order"]]
    if name in QWEN:
        received = in_image_order(tower, inputs, received).view(1, -1, 4).mean(-1)
    assert prior.dtype == torch.float32
    assert relative_error(prior, received) <= BAR


def last_attention(tower, inputs, monkeypatch):
    """Eager attention weights [B, H, S, S] of the last block the tower executes, in the model's own forward."""
    module = sys.modules[type(tower.blocks[-1].module).__module__]
    seen = []
    original = module.eager_attention_forward

    def record(attention, *arguments, **options):
        output = original(attention, *arguments, **options)
        if attention is tower.blocks[-1].module.get_submodule(tower.blocks[-1]._names.attention):
            seen.append(output[1])
        return output

    monkeypatch.setattr(module, "eager_attention_forward", record)
    tower.model.set_attn_implementation("eager")
    try:
        own_features(tower.model, inputs)
    finally:
        tower.model.set_attn_implementation("sdpa")
    assert len(seen) == 1
    return seen[0]


def in_image_order(tower, inputs, values):
    """Undo Qwen2.5-VL's permutation of the whole stream by windows; `values` is [1, P]."""
    if not tower._window:
        return values
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(inputs["image_grid_thw"], tower.merge, 56, tower.patch_size)
    return values.view(-1, 4)[index.argsort()].view(1, -1)


@pytest.mark.parametrize("name", ["llava", "llava-next"])
def test_cls_attention_equals_hugging_faces_own_weights(towers, name, monkeypatch):
    tower = towers[name]
    inputs = tower.example_inputs(1, seeded(4))
    expected = last_attention(tower, inputs, monkeypatch).mean(1)[:, 0, 1:]
    planned = tower.plan(inputs, Form(several=False, selecting=True))
    with torch.no_grad():
        stream, context = tower.embed(planned)
        prior = tower.attention_prior(tower.run_blocks(stream, context), context, planned, "cls")
    if name == "llava-next":
        expected = expected.flatten()[planned["token_order"]]
    assert relative_error(prior, expected) <= BAR


@pytest.mark.parametrize("name", FAMILIES)
def test_no_prior_without_heads_in_the_last_block(name):
    tower = tower_of(build(name))
    tower.blocks[-1].keep_heads([])
    planned = tower.plan(tower.example_inputs(1, seeded()), Form(several=False, selecting=True))
    with torch.no_grad():
        stream, context = tower.embed(planned)
        activations = tower.run_blocks(stream, context)
    with pytest.raises(InfopruneError, match="no attention head left"):
        tower.attention_prior(activations, context, planned, tower.priors[0])


def test_no_prior_from_a_last_block_that_attends_within_windows():
    model = build("qwen2.5-vl")
    model.config.vision_config.fullatt_block_indexes = [1]
    tower = tower_of(model)
    planned = tower.plan(tower.example_inputs(1, seeded()), Form(several=False, selecting=True))
    with torch.no_grad():
        stream, context = tower.embed(planned)
        activations = tower.run_blocks(stream, context)
    with pytest.raises(InfopruneError, match="within windows only"):
        tower.attention_prior(activations, context, planned, "received")


def test_priors_of_a_family_follow_its_cls_token(towers):
    assert {name: "cls" in towers[name].priors for name in FAMILIES} == {
        name: name in ("llava", "llava-next") for name in FAMILIES
    }
    assert all("received" in tower.priors for tower in towers.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_input_is_named(name):
    tower = tower_of(build(name))
    inputs = tower.example_inputs(1, seeded())
    for gone in inputs:
        with pytest.raises(InfopruneError, match=f"{gone} is missing"):
            tower.check_inputs({key: value for key, value in inputs.items() if key != gone})


@pytest.mark.parametrize("grid", [[[1, 4]], [1, 4, 4], []])
def test_a_grid_of_the_wrong_shape_is_refused(grid):
    tower = tower_of(build("qwen2-vl"))
    inputs = tower.example_inputs(1, seeded()) | {"image_grid_thw": torch.tensor(grid, dtype=torch.long)}
    with pytest.raises(InfopruneError, match="image_grid_thw"):
        tower.check_inputs(inputs)
