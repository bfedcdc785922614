"""Several images in one prompt: ids, positions and answers are those of Hugging Face on the same pixels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families import FAMILIES, seeded
from PIL import Image
from test_positions import QUESTIONS, encoded, logits_of, padded, talking
from torch import Tensor

from infoprune_export.data import scenes
from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import VLM, VisualTokens, _embed, _position_ids, answer, load, preprocess, prompt_ids
from infoprune_export.recipe import ModelSpec, TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder

TESTBEDS = {"testbed/tiny-llava": "square", "testbed/tiny-qwen2.5-vl": "mixed"}
COUNTS = (2, 1, 3)
"""Images of each question; six in all."""


@pytest.fixture(scope="module", params=TESTBEDS)
def shown(request) -> tuple[VLM, list[Image.Image]]:
    """A trained testbed and six scenes, which for Qwen are of several sizes."""
    pictures = [scenes.scene_at(11, number, TESTBEDS[request.param])[1] for number in range(6)]
    return load(ModelSpec(name_or_path=request.param)), pictures


def seen_by(vlm: VLM, pictures: list[Image.Image], tokens: TokensSpec | None = None) -> VisualTokens:
    with torch.inference_mode():
        return VisionEncoder(vlm.tower, tokens).encode(preprocess(vlm, pictures))


def groups(images: list[Any], counts: tuple[int, ...] = COUNTS) -> list[list[Any]]:
    left = iter(images)
    return [list(itertools.islice(left, count)) for count in counts]


def own_inputs(vlm: VLM, question: str, pictures: list[Image.Image]) -> dict[str, Tensor]:
    """What the model's own processor makes of a question about several images."""
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    text = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = dict(vlm.processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False))
    inputs.pop("token_type_ids", None)
    if vlm.tower.position_axes > 1:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == vlm.model.config.image_token_id).int()
    return inputs


def lengths(visual: VisualTokens) -> list[int]:
    return [len(features) for features in visual.features]


def rows_of(vlm: VLM, visual: VisualTokens) -> list[list[int]]:
    """The prompts of `QUESTIONS` about `COUNTS` images each."""
    return [prompt_ids(vlm, text, *own) for text, own in zip(QUESTIONS, groups(lengths(visual)), strict=True)]


# ── As the processor and the model do it ─────────────────────────────────────


@pytest.mark.parametrize("count", [1, 2, 3])
def test_prompt_ids_equal_the_processors_own(shown, count):
    vlm, pictures = shown
    tokens = lengths(seen_by(vlm, pictures[:count]))
    expected = own_inputs(vlm, QUESTIONS[0], pictures[:count])["input_ids"][0].tolist()
    assert prompt_ids(vlm, QUESTIONS[0], *tokens) == expected
    assert expected.count(vlm.model.config.image_token_id) == sum(tokens)


def test_positions_equal_the_models_own(shown):
    vlm, pictures = shown
    visual = seen_by(vlm, pictures)
    rows = rows_of(vlm, visual)
    mask = (padded(rows, -1) != -1).long()
    actual = _position_ids(vlm, rows, visual, mask)
    order = (mask.cumsum(1) - 1).clamp_min(0)
    if vlm.tower.position_axes == 1:
        assert torch.equal(actual, order)
        return
    assert len(set(lengths(visual))) > 1, "the images differ in size"
    for row, (question, own) in enumerate(zip(QUESTIONS, groups(pictures), strict=True)):
        inputs = own_inputs(vlm, question, own)
        expected, _ = vlm.model.model.get_rope_index(
            **{name: value for name, value in inputs.items() if name != "pixel_values"}
        )
        behind = mask.shape[1] - len(rows[row])
        assert torch.equal(actual[1:, row, behind:], expected[:, 0])
    assert torch.equal(actual[0], order)


def test_tokens_left_out_of_one_image_move_neither_the_next_nor_the_text(shown):
    vlm, pictures = shown
    whole = seen_by(vlm, pictures[:3])
    kept = [torch.arange(1, count, 3) for count in lengths(whole)]
    fewer = VisualTokens.of([one[k] for one, k in zip(whole.features, kept, strict=True)], whole.layouts, kept)
    long, short = (prompt_ids(vlm, QUESTIONS[0], *lengths(visual)) for visual in (whole, fewer))
    of_all = _position_ids(vlm, [long], whole, torch.ones(1, len(long)))
    of_some = _position_ids(vlm, [short], fewer, torch.ones(1, len(short)))
    placeholder = torch.tensor(long) == vlm.model.config.image_token_id
    stays = ~placeholder
    stays[placeholder.nonzero()[:, 0]] = torch.cat(
        [torch.isin(torch.arange(count), k) for count, k in zip(lengths(whole), kept, strict=True)]
    )
    axes = slice(1, None) if vlm.tower.position_axes > 1 else slice(None)
    assert torch.equal(of_some[axes], of_all[..., stays][axes])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_answers_of_random_models_equal_those_on_pixels(name):
    """Their answers are long and depend on every position; Qwen3-VL's deeper features are there too."""
    vlm = talking(name)
    inputs = vlm.tower.example_inputs(6, seeded(4))
    visual = encoded(vlm, inputs)
    tokenizer = vlm.processor.tokenizer
    ids = padded(rows_of(vlm, visual), tokenizer.pad_token_id)
    prompt = {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long()}
    if vlm.tower.position_axes > 1:
        prompt["mm_token_type_ids"] = (ids == vlm.model.config.image_token_id).int()
    with torch.inference_mode():
        generated = vlm.model.generate(**prompt, **inputs, do_sample=False, num_beams=1, max_new_tokens=12)
        expected = vlm.model(**prompt, **inputs).logits[:, -1]
        others = visual.rows([1, 0, 2, 5, 4, 3])
        actual, swapped = (logits_of(vlm, _embed(vlm, rows_of(vlm, v), v))[:, -1] for v in (visual, others))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    changed = (swapped - actual).abs().amax(1) > 1e-3
    assert changed.tolist() == [True, False, True], "the order of a question's images counts"
    own = [text.strip() for text in tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)]
    assert len({word for text in own for word in text.split()}) > 2
    assert answer(vlm, visual, QUESTIONS, 12, images=COUNTS) == own


def test_trained_answers_equal_generate_on_pixels(shown):
    vlm, pictures = shown
    questions = ["What color is the circle?", "How many objects are there?", "What word is on the sign?"]
    expected = []
    for question, own in zip(questions, groups(pictures), strict=True):
        inputs = own_inputs(vlm, question, own)
        with torch.inference_mode():
            generated = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=8)
        new = generated[0, inputs["input_ids"].shape[1] :]
        expected.append(vlm.processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert all(expected)
    assert answer(vlm, seen_by(vlm, pictures), questions, images=COUNTS) == expected


def test_a_batch_of_questions_is_answered_as_one_at_a_time(shown):
    vlm, pictures = shown
    tokens = TokensSpec(keep_ratio="1/3")
    together = answer(vlm, seen_by(vlm, pictures, tokens), QUESTIONS, images=COUNTS)
    alone = [
        answer(vlm, seen_by(vlm, own, tokens), [question], images=[len(own)])[0]
        for question, own in zip(QUESTIONS, groups(pictures), strict=True)
    ]
    assert together == alone


# ── Refused ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "2 images are asked about, 3 are given"),
        ([1, 1], "2 images are asked about, 3 are given"),
        ([2, 2], "4 images are asked about, 3 are given"),
        ([0, 0], "0 images are asked about, 3 are given"),
    ],
)
def test_images_that_do_not_add_up_are_refused(shown, images, message):
    vlm, pictures = shown
    with pytest.raises(InfopruneError, match=message):
        answer(vlm, seen_by(vlm, pictures[:3]), QUESTIONS[:2], images=images)


def test_a_question_with_the_image_placeholder_in_it_is_refused(shown):
    vlm, pictures = shown
    placeholder = vlm.processor.image_token
    visual = seen_by(vlm, pictures[:2])
    for question in (placeholder, f"{placeholder}\nWhat is it?", f"What is {placeholder}?"):
        with pytest.raises(InfopruneError) as caught:
            answer(vlm, visual, [QUESTIONS[0], question])
        message = str(caught.value)
        assert f"contains {placeholder}" in message
        assert "leave it out" in message
        assert message.splitlines() == [message]


@pytest.mark.parametrize("text", ["image", "<image", "image_pad|>", "< image >", "<|image_pad"])
def test_a_question_that_only_looks_like_the_placeholder_is_text(shown, text):
    vlm, _ = shown
    ids = prompt_ids(vlm, f"What is {text}?", 5, 3)
    assert ids.count(vlm.model.config.image_token_id) == 8


@pytest.mark.parametrize("images", [0, 2])
def test_a_chat_template_that_does_not_show_every_image_is_refused(images):
    vlm = load(ModelSpec(name_or_path="testbed/tiny-llava"))
    vlm.processor.chat_template = "<image>{{ messages[0].content[-1].text }}"
    assert prompt_ids(vlm, "ring ?", 3).count(vlm.model.config.image_token_id) == 3
    with pytest.raises(InfopruneError, match=f"writes <image> 1 times for {images} images"):
        prompt_ids(vlm, "ring ?", *([3] * images))
