"""Baselines on the towers of every family, and in front of the testbeds' language models."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from candidates import SELECTORS, spec
from families import FAMILIES, build, own_features, relative_error, seeded

from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Form
from infoprune_export.models.vlm import load
from infoprune_export.recipe import DataSpec, ModelSpec, TokensSpec
from infoprune_export.rewrite.surgery import apply_heads
from infoprune_export.tokens.baselines.common import attention
from infoprune_export.tokens.baselines.vscan import observed, shallow_block
from infoprune_export.tokens.encoder import VisionEncoder, check_selection
from infoprune_export.tokens.selector import METHODS
from infoprune_export.validate.accuracy import collect_answers


@pytest.fixture(scope="module")
def towers():
    return {name: tower_of(build(name)) for name in FAMILIES}


def encode(tower, tokens, inputs, several=None):
    with torch.no_grad():
        return VisionEncoder(tower, tokens, several).encode(inputs)


# ── Every tower ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", SELECTORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_different_sizes_in_one_call_are_as_they_are_alone(towers, name, method):
    tower = towers[name]
    inputs = tower.example_inputs(3, seeded())
    together = encode(tower, spec(method), inputs, several=True)
    for number, one in enumerate(tower.split(inputs)):
        single = encode(tower, spec(method), one, several=False)
        assert relative_error(together.features[number], single.features[0]) <= 1e-5
        assert torch.equal(together.layouts[number].ids, single.layouts[0].ids)
        whole = tower.layouts(one)[0]
        candidates = whole.ids.shape[1]
        if name == "llava-next":
            candidates -= int((own_features(tower.model, one)[0] == tower.model.model.image_newline).all(1).sum())
        assert len(single.features[0]) == math.ceil(candidates / 3)


@pytest.mark.parametrize("method", SELECTORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_gives_hugging_faces_features(towers, name, method):
    tower = towers[name]
    inputs = tower.example_inputs(2, seeded())
    visual = encode(tower, spec(method, 1), inputs)
    for features, layout, expected, whole in zip(
        visual.features, visual.layouts, own_features(tower.model, inputs), tower.layouts(inputs), strict=True
    ):
        places = (whole.ids[0][:, None] == layout.ids[0]).any(1) if name == "llava-next" else slice(None)
        assert relative_error(features, expected[places]) <= 1e-5
        assert torch.equal(layout.ids, whole.ids[:, places])


def test_fastervlm_is_the_models_own_cls_attention():
    model = build("llava")
    model.set_attn_implementation("eager")
    tower = tower_of(model)
    inputs = tower.example_inputs(3, seeded())
    with torch.no_grad():
        output = model.model.vision_tower(**inputs, output_attentions=True)
    # The features are the last block's but one, and so is the attention: index -2.
    attention = output.attentions[-2].mean(1)[:, 0, 1:]
    chosen = attention.argsort(dim=1, descending=True)[:, :6].sort(dim=1).values
    visual = encode(tower, spec("fastervlm", "6/16"), inputs)
    assert [layout.ids[0].tolist() for layout in visual.layouts] == chosen.tolist()


# ── VScan's block ────────────────────────────────────────────────────────────


def blocks(depth: int, *, full: tuple[int, ...] | None = None, headless: tuple[int, ...] = ()):
    windowed = [full is not None and n not in full for n in range(depth)]
    return SimpleNamespace(
        blocks=[SimpleNamespace(num_heads=0 if n in headless else 4, windowed=windowed[n]) for n in range(depth)]
    )


@pytest.mark.parametrize(
    ("tower", "block"),
    [
        (blocks(24), 5),
        (blocks(23), 5),
        (blocks(32, full=(7, 15, 23, 31)), 7),
        (blocks(32), 7),
        (blocks(5), 1),
        (blocks(5, full=(2, 4)), 2),
        (blocks(24, headless=(5, 6)), 7),
        (blocks(6, full=(5,)), 5),
        (blocks(1), 0),
    ],
)
def test_the_shallow_block_is_at_the_published_depth(tower, block: int):
    assert shallow_block(tower) == block
    assert observed(tower) == [block - 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_vscan_reads_the_shallow_blocks_own_attention(towers, name):
    """As if the tower ended there."""
    tower = towers[name]
    planned = tower.plan(tower.example_inputs(1, seeded()), Form(several=False, selecting=True))
    kind = "cls" if "cls" in tower.priors else "received"
    shortened = tower_of(tower.model)
    shortened.blocks = tower.blocks[: shallow_block(tower) + 1]
    with torch.no_grad():
        candidates = VisionEncoder(tower, spec("vscan")).candidates(planned)
        stream, context = tower.embed(planned)
        activations = shortened.run_blocks(stream, context)
        expected = shortened.attention_prior(activations, context, planned, kind)
        assert torch.equal(attention(candidates, shallow_block(tower)), expected)
        assert not torch.equal(attention(candidates), expected)


def test_vscan_works_on_a_tower_without_heads_in_its_block(towers):
    tower = tower_of(build("llava"))
    block = shallow_block(tower)
    every = tuple(range(4))
    apply_heads(tower, HeadPlan((4,) * 3, tuple(() if n == block else every for n in range(3))), {})
    assert shallow_block(tower) == block + 1
    assert len(encode(tower, spec("vscan"), tower.example_inputs(1, seeded())).features[0]) == 6


# ── Names ────────────────────────────────────────────────────────────────────


def test_every_method_of_a_recipe_is_there_and_no_other():
    assert {*METHODS, "none"} == set(get_args(TokensSpec.model_fields["method"].annotation))
    for name, method in METHODS.items():
        assert callable(method.load_shrink() if method.before else method.load())
        assert method.exported == (name == "infoprune")


def test_an_unknown_method_is_refused_with_the_known_ones(towers):
    unknown = TokensSpec().model_copy(update={"method": "fastvlm"})
    for attempt in (check_selection, VisionEncoder):
        with pytest.raises(InfopruneError, match=r"'fastvlm': there are infoprune, random, .*vscan"):
            attempt(towers["llava"], unknown)


# ── In front of a language model ─────────────────────────────────────────────


@pytest.mark.parametrize(("name", "sizes"), [("testbed/tiny-llava", "square"), ("testbed/tiny-qwen2.5-vl", "mixed")])
def test_every_method_answers_questions(name: str, sizes: str, tmp_path):
    vlm = load(ModelSpec(name_or_path=name))
    data = DataSpec(calibration_images=1, validation_questions=28, scene_sizes=sizes)
    dataset.draw_scenes(tmp_path, data, seed=8)
    samples = dataset.read(data, tmp_path).validation
    whole = collect_answers(vlm, samples, VisionEncoder(vlm.tower, None).encode)
    changed = set()
    for method in METHODS:
        answers = collect_answers(vlm, samples, VisionEncoder(vlm.tower, spec(method, "1/9")).encode)
        assert [len(row) for row in answers] == [len(row) for row in whole]
        changed |= {method} if answers != whole else set()
    assert len(changed) >= 5  # a ninth of the tokens is not enough for every question
