"""Tower, selection and projector together: which graph a selection asks for, and what the language model sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from families import FAMILIES, QWEN, build, own_features, relative_error, seeded

from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Form
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder, check_selection, form_of
from infoprune_export.tokens.reference import literal_selection

RAGGED = ("llava-next", *QWEN)


@pytest.fixture(scope="module")
def towers():
    return {name: tower_of(build(name)) for name in FAMILIES}


def spec(**options):
    return TokensSpec(**({"keep_ratio": "1/3"} | options))


def encode(tower, tokens, inputs, several=None):
    with torch.no_grad():
        return VisionEncoder(tower, tokens, several).encode(inputs)


# ── Without selection ──


@pytest.mark.parametrize("several", [None, True, False])
@pytest.mark.parametrize("tokens", [None, TokensSpec(method="none")], ids=["no section", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_without_selection_an_encoder_gives_hugging_faces_features(towers, name, tokens, several):
    tower = towers[name]
    inputs = tower.example_inputs(3, seeded())
    visual = encode(tower, tokens, inputs, several)
    images = own_features(tower.model, inputs)
    for features, layout, expected in zip(visual.features, visual.layouts, images, strict=True):
        assert relative_error(features, expected) <= 1e-5
        assert layout.ids.shape == (tower.position_axes, len(expected))


# ── With selection ──


PAPER = {"prior": "received", "quality": "softmax", "exponent": 0.5, "normalize": False, "pool_factor": 2.0}


@pytest.mark.parametrize("options", [{}, PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tokens_are_the_literal_choice_of_each_image(towers, name, options):
    """Features and prior from the tower, the choice from the listing, image by image."""
    tower = towers[name]
    inputs = tower.example_inputs(3, seeded())
    tokens = spec(merge=False, **options)
    visual = encode(tower, tokens, inputs)
    form = Form(several=False, selecting=True)
    for number, one in enumerate(tower.split(inputs)):
        planned = tower.plan(one, form)
        with torch.no_grad():
            stream, context = tower.embed(planned)
            activations = tower.run_blocks(stream, context)
            candidates = tower.visual_tokens(activations, planned)
            prior = tower.attention_prior(activations, context, planned, tokens.prior)[0].numpy()
        compared = candidates[0, :, : tower.selection_width].numpy()
        if options:
            weighted = compared, prior, 1, 3, 2.0, 0.7, 0.5
        else:  # q = a / max a is a softmax of log a, and tokens count by direction
            weighted = compared / np.linalg.norm(compared, axis=1, keepdims=True), np.log(prior), 1, 3, 8.0, 1.0, 1.0
        kept = torch.tensor(sorted(literal_selection(*weighted)))
        assert len(kept) == math.ceil(candidates.shape[1] / 3)
        assert relative_error(visual.features[number], tower.project(candidates[:, kept])[0]) <= 1e-5
        places = tower.kept_positions(kept[None], planned)[0]
        assert torch.equal(visual.layouts[number].ids, tower.layouts(one)[0].ids[:, places])
        assert visual.layouts[number].advance == tower.layouts(one)[0].advance


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_changes_nothing_but_newlines(towers, name):
    tower = towers[name]
    inputs = tower.example_inputs(2, seeded())
    visual = encode(tower, spec(keep_ratio=1), inputs)
    for features, layout, expected, whole in zip(
        visual.features, visual.layouts, own_features(tower.model, inputs), tower.layouts(inputs), strict=True
    ):
        places = (whole.ids[0][:, None] == layout.ids[0]).any(1) if name == "llava-next" else slice(None)
        assert relative_error(features, expected[places]) <= 1e-5
        assert torch.equal(layout.ids, whole.ids[:, places])
        if name == "llava-next":
            newline = tower.model.model.image_newline
            assert torch.equal(~places, (expected == newline).all(1))


@pytest.mark.parametrize("name", RAGGED)
def test_an_images_selection_does_not_depend_on_its_company(towers, name):
    tower = towers[name]
    inputs = tower.example_inputs(3, seeded())
    together = encode(tower, spec(), inputs)
    for number, one in enumerate(tower.split(inputs)):
        alone = encode(tower, spec(), one)
        assert torch.equal(alone.features[0], together.features[number])
        assert torch.equal(alone.layouts[0].ids, together.layouts[number].ids)


@pytest.mark.parametrize("options", [{}, {"prior": "received", "merge": False}], ids=["default", "without merge"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", RAGGED)
def test_one_call_for_images_of_different_sizes_equals_one_call_each(towers, name, images, options):
    tower = towers[name]
    inputs = tower.example_inputs(images, seeded(4))
    tokens = spec(**options)
    together, alone = (encode(tower, tokens, inputs, several) for several in (True, False))
    assert len(together.features) == images
    for features, expected in zip(together.features, alone.features, strict=True):
        assert relative_error(features, expected) <= 1e-5
    for layout, expected in zip(together.layouts, alone.layouts, strict=True):
        assert torch.equal(layout.ids, expected.ids)
        assert layout.advance == expected.advance
    assert images == 1 or len({len(features) for features in together.features}) > 1


@pytest.mark.parametrize("name", RAGGED)
def test_kept_indices_of_smaller_images_end_in_minus_one(towers, name):
    tower = towers[name]
    inputs = tower.example_inputs(3, seeded(4))
    encoder = VisionEncoder(tower, spec(), several=True)
    (planned,) = tower.calls(inputs, encoder.form)
    with torch.no_grad():
        outputs = encoder.run(planned)
    kept = outputs["kept_indices"]
    assert kept.shape == outputs["image_features"].shape[:2]
    counts = planned["token_counts"]
    assert ((kept >= 0).sum(1) == (counts + 2) // 3).all()
    for row, layout in zip(kept, tower.layouts(inputs), strict=True):
        own = row[: int((row >= 0).sum())]
        assert (own[1:] > own[:-1]).all()
        assert own[-1] < layout.ids.shape[1]
    assert len(set(counts.tolist())) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_named_and_typed(towers, name):
    tower = towers[name]
    for tokens, names in ((None, ["image_features"]), (spec(), ["image_features", "kept_indices"])):
        encoder = VisionEncoder(tower, tokens)
        with torch.no_grad():
            outputs = encoder.run(tower.calls(tower.example_inputs(2, seeded()), encoder.form)[0])
        assert list(outputs) == encoder.output_names == names
        if len(outputs) > 1:
            kept = outputs["kept_indices"]
            assert kept.dtype == torch.int64
            assert kept.shape == outputs["image_features"].shape[:2]
            assert (kept[:, 1:] > kept[:, :-1]).all()


def test_deepstack_features_stay_with_their_token(towers):
    """Selection compares the merger's output alone, and keeps all levels of what it chose."""
    tower = towers["qwen3-vl"]
    inputs = tower.example_inputs(1, seeded())
    whole = own_features(tower.model, inputs)[0]
    features = encode(tower, spec(merge=False), inputs).features[0]
    assert features.shape[1] == whole.shape[1] == 3 * tower.selection_width
    distance = torch.cdist(features, whole, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(1).values.max() <= 1e-4 * whole.norm(dim=1).max()
    chosen = distance.argmin(1)
    assert (chosen[1:] > chosen[:-1]).all()


# ── Forms and refusals ──


@pytest.mark.parametrize("name", FAMILIES)
def test_several_images_per_call_unless_their_sizes_differ_and_tokens_are_selected(towers, name):
    tower = towers[name]
    assert form_of(tower, None) == form_of(tower, TokensSpec(method="none")) == Form(several=True)
    assert form_of(tower, None, several=False) == Form(several=False)
    assert form_of(tower, spec()) == Form(several=name not in RAGGED, selecting=True)
    assert form_of(tower, spec(), several=True) == Form(several=True, selecting=True)


@pytest.mark.parametrize("name", ["llava-siglip", *QWEN])
def test_cls_prior_is_refused_where_there_is_no_cls_token(towers, name):
    for attempt in (check_selection, VisionEncoder):
        with pytest.raises(InfopruneError, match=r"'cls': this tower has no \[CLS\] token; use received"):
            attempt(towers[name], spec(prior="cls"))
    check_selection(towers[name], TokensSpec(method="none", prior="cls"))


@pytest.mark.parametrize("name", QWEN)
def test_contiguous_positions_are_refused_under_mrope(towers, name):
    with pytest.raises(InfopruneError, match=r"'contiguous': .*M-RoPE"):
        check_selection(towers[name], spec(positions="contiguous"))
    check_selection(towers[name], TokensSpec(method="none", positions="contiguous"))


@pytest.mark.parametrize("name", ["llava", "llava-siglip", "llava-next"])
def test_contiguous_positions_number_what_is_kept(towers, name):
    tower = towers[name]
    visual = encode(tower, spec(positions="contiguous"), tower.example_inputs(2, seeded()))
    for features, layout in zip(visual.features, visual.layouts, strict=True):
        assert layout.ids.tolist() == [list(range(len(features)))]
        assert layout.advance == len(features)


def test_both_priors_pass_where_there_is_a_cls_token(towers):
    for name in ("llava", "llava-next"):
        for prior in ("cls", "received"):
            check_selection(towers[name], spec(prior=prior, positions="contiguous"))
