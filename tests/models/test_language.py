"""Decoder layers of every family: removing a part computes what masking it computes, with and without a cache."""

from __future__ import annotations

import functools
from fractions import Fraction

import pytest
import torch
from decoders import LEFT, as_lists, generate, masked_reference, model_of, numbers, pruned_logits
from families import FAMILIES, relative_error
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaConfig, MistralConfig

from infoprune_export.errors import InfopruneError
from infoprune_export.models.language import check_heads, is_pruned, knows, language_layers, replace_weights
from infoprune_export.models.zoo import TINY
from infoprune_export.tokens.steps import Step

# Four query heads over two key-value heads: a whole group gone, one query of each gone, both, nothing, other queries.
KEPT = ((2, 3), (0, 3), (1,), (0, 1, 2, 3), (1, 2))
NEURONS = (range(0, 64, 2), range(64), (5,), range(7, 64), range(32))
# Three groups of three, one of them gone, two queries left in each.
WIDE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}


def pruned(model):
    for layer, heads, neurons in zip(language_layers(model), KEPT, NEURONS, strict=True):
        layer.keep_heads(heads)
        layer.keep_neurons(neurons)
    return model


@functools.cache
def small(family, attention="sdpa"):
    return pruned(model_of(family, attention))


def masked(model, kept=KEPT, neurons=NEURONS):
    """What is dropped enters its projection as zero."""
    for layer, heads, some in zip(language_layers(model), kept, neurons, strict=True):
        width = layer.head_dim
        for projection, places in (
            (layer.attention_out, [head * width + c for head in heads for c in range(width)]),
            (layer.ffn_out, list(some)),
        ):
            mask = torch.zeros(projection.in_features).index_fill(0, torch.tensor(places), 1.0)
            projection.register_forward_pre_hook(lambda _, arguments, mask=mask: (arguments[0] * mask,))
    return model


def logits(model, batch=LEFT):
    return pruned_logits(model, batch, [])[0][batch.mask.bool()]


def custom(text):
    """A LLaVA around another text model."""
    config = LlavaConfig(vision_config=TINY["llava"](3).vision_config, text_config=text, image_token_index=4)
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


def text_config(kind, **overrides):
    settings = {"num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48, "pad_token_id": 0} | WIDE
    return kind(**settings | overrides)


# ── Masked and removed ───────────────────────────────────────────────────────


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_removed_is_masked(family, attention):
    expected = logits(masked(model_of(family, attention)))
    assert relative_error(logits(small(family, attention)), expected) <= 1e-5
    assert relative_error(logits(model_of(family, attention)), expected) > 1e-2


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize(
    ("groups", "kept", "sizes"),
    [
        ({}, (1, 2, 6, 8), (4, 2)),
        ({"num_key_value_heads": 9}, (0, 4, 8), (3, 3)),
        ({"num_key_value_heads": 1}, (2, 7), (2, 1)),
    ],
)
def test_groups_of_any_size(kind, groups, kept, sizes):
    """Several groups of three, plain heads, one key-value head for all."""
    options = {"attention_bias": True, "mlp_bias": True} if kind is LlamaConfig else {}
    text = text_config(kind, **groups, **options)
    whole, small_one = custom(text), custom(text)
    for layer in language_layers(small_one):
        layer.keep_heads(kept)
        layer.keep_neurons((3, 40))
        assert (layer.num_heads, layer.num_key_value_heads, layer.group_size) == (*sizes, sizes[0] // sizes[1])
        assert layer.num_neurons == 2
        assert [part.out_features for part in layer.ffn_in] == [2, 2]
    masked(whole, [kept] * 2, [(3, 40)] * 2)
    embeds = torch.randn(2, 7, 72, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    outputs = [model(inputs_embeds=embeds, attention_mask=mask).logits[mask.bool()] for model in (small_one, whole)]
    assert relative_error(*outputs) <= 1e-5


# ── Generation ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_generation_without(family, attention):
    """Left padding; the layers' caches hold 1 or 2 key-value heads."""
    model = small(family, attention)
    with_cache, _ = generate(model, LEFT)
    if family != "qwen3-vl":  # its deepstack features are given for the prompt alone
        without, _ = generate(model, LEFT, use_cache=False)
        assert torch.equal(with_cache.sequences, without.sequences)
        for cached, fresh in zip(with_cache.logits, without.logits, strict=True):
            assert relative_error(cached, fresh) <= 1e-4
    assert [layer.keys.shape[1] for layer in with_cache.past_key_values.layers] == [1, 2, 1, 2, 2]


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_beams_and_generation_equal_the_masked_models(family):
    whole = masked(model_of(family))
    for options in ({}, {"num_beams": 3}):
        ours, theirs = generate(small(family), LEFT, **options)[0], generate(whole, LEFT, **options)[0]
        assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_stage_2_works_on_top(family):
    """The same pruned model that sees everything but may not attend to what was dropped."""
    steps = [Step(1, Fraction(1, 2)), Step(3, Fraction(1, 4))]
    expected, kept = masked_reference(small(family, "eager"), LEFT, steps)
    actual, trace = pruned_logits(small(family), LEFT, steps)
    assert as_lists(trace) == numbers(LEFT, kept)
    assert relative_error(actual[:, -1], expected[:, -1]) <= 1e-5
    made, trace = generate(small(family), LEFT, steps)
    assert made.sequences.shape[1] == 5
    assert trace.per_layer[0].tolist() == [13, 13, 7, 7, 4]


# ── Structure ────────────────────────────────────────────────────────────────


def test_what_is_removed_is_gone():
    first = language_layers(small("qwen2.5-vl"))[0]
    attention = first.module.self_attn
    shapes = {name: list(value.shape) for name, value in attention.named_parameters()}
    assert shapes == {
        "q_proj.weight": [32, 64],
        "q_proj.bias": [32],
        "k_proj.weight": [16, 64],
        "k_proj.bias": [16],
        "v_proj.weight": [16, 64],
        "v_proj.bias": [16],
        "o_proj.weight": [64, 32],
    }
    assert (attention.num_heads, attention.num_key_value_heads, attention.num_key_value_groups) == (2, 1, 2)
    assert is_pruned(small("qwen2.5-vl"))
    assert not is_pruned(model_of("qwen2.5-vl"))


@pytest.mark.parametrize("heads", [(), (0, 1, 2), (0, 2, 3), (1, 2, 3)])
def test_unequal_groups_and_layers_without_heads_are_refused(heads):
    with pytest.raises(InfopruneError, match="at least one key-value head, and equally many"):
        language_layers(model_of("llava"))[0].keep_heads(heads)


def test_the_key_value_heads_that_stay_are_those_attended_to():
    assert check_heads((0, 5), 2) == [0, 2]
    assert check_heads((3, 4, 5), 3) == [1]


def test_a_layer_without_neurons_is_refused():
    with pytest.raises(InfopruneError, match="0 neurons"):
        language_layers(model_of("llava"))[0].keep_neurons(())


def test_unknown_text_models_are_refused_by_name():
    model = model_of("llava")
    model.model.language_model.config.model_type = "olmo2"
    assert not knows(model)
    with pytest.raises(InfopruneError, match=r"'olmo2'.*language.method: none"):
        language_layers(model)


def test_replaced_weights_leave_a_sharing_copy_alone():
    projection, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.weight, other.bias = projection.weight, projection.bias
    before = projection.weight.clone()
    replace_weights(other, torch.ones(2, 3), torch.zeros(2))
    assert torch.equal(projection.weight, before)
    assert torch.equal(other.weight, torch.ones(2, 3))


@pytest.mark.parametrize(("weight", "bias"), [((2, 4), (2,)), ((2, 3), None), ((2, 3), (3,))])
def test_weights_of_another_shape_are_refused(weight, bias):
    with pytest.raises(InfopruneError, match="the layer needs"):
        replace_weights(nn.Linear(3, 2), torch.zeros(weight), None if bias is None else torch.zeros(bias))
