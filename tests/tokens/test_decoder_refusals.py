"""What a pruned decoder refuses, and that it leaves the model as it was, however a block ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from decoders import HALF, LEFT, THIRD, generate, model_of, pruned_logits
from torch import Tensor
from transformers import DynamicCache

from infoprune_export.errors import InfopruneError
from infoprune_export.tokens.decoder import pruned_decoder
from infoprune_export.tokens.steps import Asked, Step, last_token

# ── Restored ─────────────────────────────────────────────────────────────────


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["llava", "qwen3-vl"])
def test_the_model_is_restored_after_a_block_and_after_errors_inside_it(family: str):
    model = model_of(family)
    before = model(**LEFT.inputs(model)).logits

    def fail(asked: Asked) -> Tensor:
        raise ZeroDivisionError

    blocks: list[tuple[list[Step], Callable[[], object]]] = [
        ([Step(1, HALF)], lambda: model(**LEFT.inputs(model))),
        ([Step(1, HALF)], lambda: 1 / 0),
        ([Step(1, HALF, queries=fail)], lambda: model(**LEFT.inputs(model))),
    ]
    for steps, run in blocks:
        with contextlib.suppress(ZeroDivisionError), pruned_decoder(model, LEFT.visual, LEFT.mask, steps):
            run()
        assert model.model.language_model.config._attn_implementation == "sdpa"
        assert hooks_of(model) == 0
        assert torch.equal(model(**LEFT.inputs(model)).logits, before)


def test_blocks_follow_each_other_and_do_not_nest():
    model = model_of("llava")
    first, _ = pruned_logits(model, LEFT, [Step(1, HALF)])
    with pruned_decoder(model, LEFT.visual, LEFT.mask, [Step(1, HALF)]):
        with pytest.raises(InfopruneError, match="being pruned already"):
            pruned_decoder(model, LEFT.visual, LEFT.mask, []).__enter__()
        assert torch.equal(model(**LEFT.inputs(model)).logits, first)
    assert torch.equal(pruned_logits(model, LEFT, [Step(1, HALF)])[0], first)


# ── Refused ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Step(4, HALF)], "layer 4: .* 5 in all.*use 0 to 3"),
        ([Step(5, HALF)], "layer 5"),
        ([Step(-1, HALF)], "layer -1"),
        ([Step(2, HALF), Step(1, THIRD)], "ascending"),
        ([Step(1, HALF), Step(1, THIRD)], "at most one step"),
        ([Step(1, Fraction(0))], "outside"),
        ([Step(1, Fraction(3, 2))], "3/2 is outside"),
    ],
)
def test_steps_that_do_not_fit_are_refused(steps: list[Step], message: str):
    with pytest.raises(InfopruneError, match=message):
        pruned_logits(model_of("llava"), LEFT, steps)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|sdpa", None])
def test_attention_that_cannot_be_read_is_refused(name: str | None):
    model = model_of("llava")
    model.model.language_model.config._attn_implementation = name
    with pytest.raises(InfopruneError, match="attn_implementation='sdpa'"):
        pruned_logits(model, LEFT, [Step(1, HALF)])
    assert model.model.language_model.config._attn_implementation == name


def test_a_static_cache_is_refused():
    model = model_of("llava")
    with pytest.raises(InfopruneError, match="StaticCache.*DynamicCache"):
        generate(model, LEFT, [Step(1, HALF)], cache_implementation="static")


@pytest.mark.parametrize("length", [1, 2])
def test_a_second_turn_is_refused(length: int):
    model = model_of("llava")
    more = {"inputs_embeds": LEFT.embeds[:, :length], "attention_mask": torch.ones(3, 20 + length)}
    with pruned_decoder(model, LEFT.visual, LEFT.mask, [Step(1, HALF)]):
        cache = model(**LEFT.inputs(model), use_cache=True).past_key_values
        if length > 1:
            with pytest.raises(InfopruneError, match="2 tokens on a cache of 20"):
                model(**more, past_key_values=cache)
    with (
        pruned_decoder(model, LEFT.visual, LEFT.mask, [Step(1, HALF)]),
        pytest.raises(InfopruneError, match="inside its own block"),
    ):
        model(**more, past_key_values=cache)


def test_a_cache_that_was_filled_elsewhere_is_refused():
    model = model_of("llava")
    cache = model(**LEFT.inputs(model), past_key_values=DynamicCache(config=model.config.text_config)).past_key_values
    with pruned_decoder(model, LEFT.visual, LEFT.mask, [Step(1, HALF)]):
        model(**LEFT.inputs(model))
        with pytest.raises(InfopruneError, match="layer 2 has 20 cached tokens, expected 13"):
            model(inputs_embeds=LEFT.embeds[:, :1], attention_mask=torch.ones(3, 21), past_key_values=cache)


@pytest.mark.parametrize(
    ("visual", "mask"),
    [(LEFT.visual, LEFT.mask[:, 1:]), (LEFT.visual[0], LEFT.mask[0]), (LEFT.visual, LEFT.mask[:, None, None])],
)
def test_masks_of_the_wrong_shape_are_refused(visual: Tensor, mask: Tensor):
    with pytest.raises(InfopruneError, match="both must be"):
        pruned_decoder(model_of("llava"), visual, mask, [Step(1, HALF)]).__enter__()


@pytest.mark.parametrize("part", [(slice(2), slice(None)), (slice(None), slice(10))])
def test_prompts_that_the_masks_do_not_describe_are_refused(part: tuple[slice, slice]):
    model = model_of("llava")
    with (
        pruned_decoder(model, LEFT.visual, LEFT.mask, [Step(1, HALF)]),
        pytest.raises(InfopruneError, match="visual_mask is 3 x 20, the model's input"),
    ):
        model(inputs_embeds=LEFT.embeds[part], attention_mask=LEFT.mask[part])


def test_language_models_of_another_build_are_refused():
    model = model_of("qwen2-vl")
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    with pytest.raises(InfopruneError, match="sliding_attention"):
        pruned_logits(model, LEFT, [Step(1, HALF)])
    with pytest.raises(InfopruneError, match=r"Linear has no model\.language_model"):
        pruned_decoder(torch.nn.Linear(1, 1), LEFT.visual, LEFT.mask, []).__enter__()


def test_last_token_is_one_per_row():
    asked = Asked(LEFT.embeds, LEFT.visual, LEFT.mask.bool(), torch.tensor([5, 0, 19]))
    assert last_token(asked).nonzero().tolist() == [[0, 5], [1, 0], [2, 19]]
