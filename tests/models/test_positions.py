"""Where visual tokens stand in the language model, and generation from features against generation from pixels."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, QWEN, build, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.data import testbed
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Layout
from infoprune_export.models.vlm import (
    VLM,
    VisualTokens,
    _deepstack,
    _embed,
    _position_ids,
    answer,
    answer_loss,
    prompt_ids,
)
from infoprune_export.models.zoo import IMAGE_TOKEN

# Their language models take one feature vector per token; Qwen3-VL's takes more, by another way.
QUESTIONS = ["How many objects are there?", "Is there a ring?", "What word is on the sign in the image?"]


@functools.cache
def bare(name):
    return VLM(model := build(name), None, tower_of(model))


@functools.cache
def talking(name):
    """A random model that speaks the testbed's language."""
    processor = testbed.build_qwen_processor() if name in QWEN else testbed.build_processor()
    model = build(name)
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight.copy_(0.3 * torch.randn(table.weight.shape))
        for key, parameter in model.model.language_model.named_parameters():
            if "q_proj" in key or "k_proj" in key:
                parameter.mul_(2)  # attention that looks at positions
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return VLM(model, processor, tower_of(model))


def encoded(vlm, inputs):
    """Every image's visual tokens from the tower, none selected."""
    layouts = vlm.tower.layouts(inputs)
    with torch.inference_mode():
        features = vlm.tower.features_of(inputs)
    if vlm.tower.ragged:
        return VisualTokens.of(features[0].split([layout.ids.shape[1] for layout in layouts]), layouts)
    return VisualTokens.of(list(features), layouts)


def padded(rows, value=0):
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + row for row in rows])


# ── Position ids ──

sides = st.integers(1, 9).map(lambda tokens: 2 * tokens)
prompts = st.lists(st.tuples(st.tuples(sides, sides), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=3)


def rows_of(layouts, texts):
    return [
        [10] * before + [IMAGE_TOKEN] * layout.ids.shape[1] + [11] * behind
        for layout, (before, behind) in zip(layouts, texts, strict=True)
    ]


@pytest.mark.parametrize("name", QWEN)
@settings(derandomize=True, deadline=None, max_examples=30)
@given(prompts)
def test_position_ids_equal_the_models_own_rope_index(name, drawn):
    """Prompts with one image each, of any size, left-padded to the longest."""
    vlm = bare(name)
    grids = torch.tensor([(1, *grid) for grid, _, _ in drawn])
    layouts = vlm.tower.layouts({"image_grid_thw": grids})
    rows = rows_of(layouts, [texts for _, *texts in drawn])
    ids = padded(rows)
    mask = (ids != 0).long()
    actual = _position_ids(vlm, rows, VisualTokens([], layouts), mask)
    expected, _ = vlm.model.model.get_rope_index(
        ids, image_grid_thw=grids, attention_mask=mask, mm_token_type_ids=(ids == IMAGE_TOKEN).int()
    )
    seen = mask.bool()
    assert actual.shape == (4, *ids.shape)
    assert torch.equal(actual[1:, seen], expected[:, seen])
    assert torch.equal(actual[0, seen], (mask.cumsum(1) - 1)[seen])


@pytest.mark.parametrize("name", FAMILIES)
def test_position_ids_of_kept_tokens_are_columns_of_all_tokens(name):
    """Leaving tokens out moves nothing else."""
    vlm = bare(name)
    inputs = vlm.tower.example_inputs(2, seeded())
    layouts = vlm.tower.layouts(inputs)
    kept = [torch.arange(0, layouts[0].ids.shape[1], 3), torch.tensor([0, 1, 7])]
    visual = VisualTokens.of([], layouts, kept)
    rows = rows_of(layouts, [(2, 4), (1, 3)])
    fewer = rows_of(visual.layouts, [(2, 4), (1, 3)])
    whole = _position_ids(vlm, rows, VisualTokens([], layouts), (padded(rows) != 0).long())
    partial = _position_ids(vlm, fewer, visual, (padded(fewer) != 0).long())
    for row, first, chosen in ((0, 2, kept[0]), (1, 1, kept[1])):
        columns = [*range(first), *(first + chosen).tolist()]
        columns += range(first + layouts[row].ids.shape[1], len(rows[row]))
        expected = whole[..., row, whole.shape[-1] - len(rows[row]) :][..., columns]
        actual = partial[..., row, partial.shape[-1] - len(fewer[row]) :]
        axes = slice(1, None) if vlm.tower.position_axes > 1 else slice(None)
        assert torch.equal(actual[axes], expected[axes])
        if vlm.tower.position_axes > 1:
            assert actual[0].tolist() == list(range(len(fewer[row])))


@pytest.mark.parametrize("name", ["llava", "llava-siglip", "llava-next"])
def test_position_ids_without_selection_count_up(name):
    vlm = bare(name)
    layouts = vlm.tower.layouts(vlm.tower.example_inputs(2, seeded()))
    rows = rows_of(layouts, [(2, 4), (1, 3)])
    mask = (padded(rows) != 0).long()
    assert torch.equal(_position_ids(vlm, rows, VisualTokens([], layouts), mask), (mask.cumsum(1) - 1).clamp_min(0))


def test_contiguous_positions_close_the_gaps():
    vlm = bare("llava")
    layouts = [Layout(torch.arange(10)[None], 10)] * 2
    visual = VisualTokens.of([], layouts, [torch.tensor([3, 7]), torch.tensor([0, 9])], contiguous=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    ids = _position_ids(vlm, [[2, 4, 4, 5, 6], [4, 4, 9]], visual, mask)
    assert ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]


def test_kept_positions_reach_the_language_model():
    vlm = bare("llava")
    layouts = [Layout(torch.arange(10)[None], 10)] * 2
    visual = VisualTokens.of([], layouts, [torch.tensor([3, 7]), torch.tensor([0, 9])])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    ids = _position_ids(vlm, [[2, 4, 4, 5, 6], [4, 4, 9]], visual, mask)
    assert ids[0].tolist() == [0, 1 + 3, 1 + 7, 11, 12]
    assert ids[1, 2:].tolist() == [0, 9, 10]


def test_rows_repeat_features_and_layouts_together():
    layouts = [Layout(torch.arange(n)[None], n) for n in (2, 3)]
    visual = VisualTokens.of([torch.zeros(2, 4), torch.ones(3, 4)], layouts).rows([1, 1, 0])
    assert [len(features) for features in visual.features] == [3, 3, 2]
    assert [layout.advance for layout in visual.layouts] == [3, 3, 2]


# ── From features as from pixels ──


def own_answers(vlm, inputs, questions, count):
    layouts = vlm.tower.layouts(inputs)
    rows = [prompt_ids(vlm, question, layout.ids.shape[1]) for question, layout in zip(questions, layouts, strict=True)]
    tokenizer = vlm.processor.tokenizer
    ids = padded(rows, tokenizer.pad_token_id)
    prompt = {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}
    if vlm.tower.position_axes > 1:
        prompt["mm_token_type_ids"] = (ids == vlm.model.config.image_token_id).int()
    with torch.inference_mode():
        generated = vlm.model.generate(**prompt, **inputs, do_sample=False, num_beams=1, max_new_tokens=count)
    texts = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def logits_of(vlm, prompt):
    with _deepstack(vlm, prompt):
        return vlm.model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.mask,
            position_ids=prompt.positions,
            use_cache=False,
        ).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_from_features_equal_generate_on_pixels(name):
    """Several tokens, so that every later step's position counts; twice, since the models remember positions."""
    vlm = talking(name)
    inputs = vlm.tower.example_inputs(3, seeded())
    visual = encoded(vlm, inputs)
    expected = own_answers(vlm, inputs, QUESTIONS, 12)
    assert len({word for text in expected for word in text.split()}) > 2
    assert answer(vlm, visual, QUESTIONS, 12) == expected
    assert [answer(vlm, visual.rows([row]), [question], 12)[0] for row, question in enumerate(QUESTIONS)] == expected
    assert own_answers(vlm, inputs, QUESTIONS, 12) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_generated_tokens_continue_the_positions_of_the_prompt(name):
    """Step by step, with a cache, what one forward over the whole text gives, tokens left out of the image too."""
    vlm = talking(name)
    inputs = vlm.tower.example_inputs(2, seeded(2))
    whole = encoded(vlm, inputs)
    kept = [torch.arange(0, len(features), 2) for features in whole.features]
    features = [one[index] for one, index in zip(whole.features, kept, strict=True)]
    visual = VisualTokens.of(features, vlm.tower.layouts(inputs), kept)
    rows = [prompt_ids(vlm, q, len(f)) for q, f in zip(QUESTIONS[1:], visual.features, strict=True)]
    with torch.inference_mode():
        prompt = _embed(vlm, rows, visual)
        with _deepstack(vlm, prompt):
            output = vlm.model.generate(
                inputs_embeds=prompt.embeds,
                attention_mask=prompt.mask,
                position_ids=prompt.positions,
                do_sample=False,
                min_new_tokens=6,
                max_new_tokens=6,
                suppress_tokens=[vlm.model.config.image_token_id],
                output_logits=True,
                return_dict_in_generate=True,
            )
        longer = [row + new for row, new in zip(rows, output.sequences.tolist(), strict=True)]
        full = logits_of(vlm, _embed(vlm, longer, visual))
    stepwise = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(stepwise, full[:, -7:-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_matter_to_these_models(name):
    """The comparisons above could not fail otherwise."""
    vlm = talking(name)
    inputs = vlm.tower.example_inputs(1, seeded(2))
    visual = encoded(vlm, inputs)
    rows = [prompt_ids(vlm, QUESTIONS[0], len(visual.features[0]))]
    with torch.inference_mode():
        prompt = _embed(vlm, rows, visual)
        moved = prompt.positions.clone()
        moved[..., -4:] += 1
        logits = [logits_of(vlm, p)[0, -1] for p in (prompt, replace(prompt, positions=moved))]
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * logits[0].abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_answer_loss_equals_cross_entropy_on_pixels(name):
    vlm = talking(name)
    inputs = vlm.tower.example_inputs(2, seeded())
    visual = encoded(vlm, inputs)
    tokenizer = vlm.processor.tokenizer
    texts = ["yes", "42"]
    replies = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    rows = [
        prompt_ids(vlm, question, len(features)) + reply
        for question, features, reply in zip(QUESTIONS, visual.features, replies, strict=False)
    ]
    ids = padded(rows, tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, reply in enumerate(replies):
        labels[row, -len(reply) :] = torch.tensor(reply)
    prompt = {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}
    if vlm.tower.position_axes > 1:
        prompt["mm_token_type_ids"] = (ids == vlm.model.config.image_token_id).int()
    with torch.no_grad():
        expected = vlm.model(**prompt, **inputs).loss
        actual = answer_loss(vlm, visual, QUESTIONS[:2], texts)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
