"""What first tokens are compared on: the recipe's budgets on a large model, refused before anything is exported."""

from __future__ import annotations

import pytest
import torch

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.models.vlm import VLM, answer
from infoprune_export.recipe import DecoderSpec, HeadsSpec, ModelSpec, Recipe, TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate import first_token_models


def tiny() -> VLM:
    """An untrained LLaVA: one executed block of 4 heads, FFN 128, 64 visual tokens, 4 decoder layers."""
    model = testbed.build_model(layers=2, hidden_size=32, heads=4, seed=3).eval().requires_grad_(False)
    return VLM(model, testbed.build_processor(), tower_of(model))


def recipe(**sections) -> Recipe:
    return Recipe(name="t", model=ModelSpec(name_or_path="testbed/tiny-llava"), **sections)


@pytest.fixture
def at_tiny_size(monkeypatch):
    """`first_token_models` with a tiny model in the place of the large one; what would be exported is listed."""
    exported = []
    monkeypatch.setattr(first_token_models, "random_model", lambda name: tiny().model)
    monkeypatch.setattr(
        first_token_models, "export_onnx", lambda tower, tokens, folder, *, opset: exported.append((tower, tokens))
    )
    return exported


@pytest.mark.parametrize(
    ("sections", "heads", "neurons"),
    [
        ({}, 2, 64),
        ({"heads": HeadsSpec(remove=0.25)}, 3, 64),
        ({"heads": HeadsSpec(method="none")}, 4, 64),
        ({"ffn": {"method": "none"}}, 2, 128),
    ],
)
def test_the_large_model_is_pruned_by_the_recipes_budgets(at_tiny_size, tmp_path, sections, heads, neurons):
    first_token_models.export_real_size(recipe(**sections), tmp_path)
    (original, everything), (compressed, selected) = at_tiny_size
    assert (original.head_counts(), [shape.size for shape in original.ffn_shapes()]) == ([4], [128])
    assert (compressed.head_counts(), [shape.size for shape in compressed.ffn_shapes()]) == ([heads], [neurons])
    assert everything is None
    assert selected == TokensSpec()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tokens": TokensSpec(method="stride")}, "tokens.method = 'stride'.*cannot be exported"),
        ({"decoder": DecoderSpec(method="infoprune", layer=3)}, "layer 3: .*4 in all.*use 0 to 2"),
        ({"decoder": DecoderSpec(method="pyramiddrop", layer=1)}, "use auto"),
    ],
)
def test_what_the_large_model_cannot_do_is_refused_before_it_is_exported(at_tiny_size, tmp_path, sections, message):
    with pytest.raises(InfopruneError, match=message):
        first_token_models.export_real_size(recipe(**sections), tmp_path)
    assert at_tiny_size == []


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (DecoderSpec(), [64, 64, 22, 22]),
        (DecoderSpec(method="infoprune", layer=0, keep_ratio="1/2"), [64, 32, 32, 32]),
        (DecoderSpec(method="random", keep_ratio="1/4"), [64, 64, 16, 16]),
        (DecoderSpec(method="fastv", keep_ratio="1/2"), [64, 32, 32, 32]),
        (DecoderSpec(method="pyramiddrop", keep_ratio="1/2"), [64, 32, 16, 8]),
    ],
)
def test_the_second_stage_of_the_large_model_is_the_recipes_or_the_papers(monkeypatch, spec, expected):
    """K is in the middle where it would have to be found; the published methods keep their own layers."""
    seen = []

    def traced(*arguments, **options):
        return original(*arguments, **options, on_trace=lambda trace: seen.append(trace.per_layer[0].tolist()))

    original = first_token_models.decoding_of
    monkeypatch.setattr(first_token_models, "decoding_of", traced)
    vlm = tiny()
    inside = first_token_models._second_stage(recipe(decoder=spec), vlm.model)
    visual = VisionEncoder(vlm.tower, None).encode(vlm.tower.example_inputs(1, torch.Generator()))
    answer(vlm, visual, ["Is there a ring?"], 1, inside)
    assert seen == [expected]
