"""The shipped checkpoints: what they load with, what they know."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from infoprune_export.data import scenes, testbed
from infoprune_export.data.training.batches import pack_questions
from infoprune_export.data.training.families import FAMILIES
from infoprune_export.data.training.labels import grid_of
from infoprune_export.data.training.loop import normalise

BUILDERS = {
    "tiny-llava": (testbed.build_model, testbed.build_processor),
    "tiny-qwen2.5-vl": (testbed.build_qwen_model, testbed.build_qwen_processor),
}


def prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


# ── Trained ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", BUILDERS)
def test_shipped_model_answers_fresh_scenes(name: str):
    """About 93% on many questions; 560 leave a standard error of one point.

    An answer is what greedy decoding says when each of its tokens is the likeliest after those before it.
    """
    family = FAMILIES[name](seed=0)
    shipped = AutoModelForImageTextToText.from_pretrained(testbed.checkpoint(name))
    family.model.load_state_dict(shipped.float().state_dict())
    tokenizer, right = family.processor.tokenizer, []
    for index in range(80):
        scene, image = scenes.scene_at(20_000, index, family.scene_sizes)
        asked = scenes.ask(scene, np.random.default_rng([20_000, index, 1]), 7)
        prefix = family.prefix(*grid_of(scene))
        packed = pack_questions(tokenizer, [[(q.text, q.answer, 1.0) for q in asked]], prefix)
        start, end = prefix.image_start, prefix.image_start + prefix.visual_tokens
        with torch.inference_mode():
            pixels = normalise(family, torch.from_numpy(np.array(image)[None]).permute(0, 3, 1, 2))
            embeds = family.model.get_input_embeddings()(packed.ids)
            embeds[:, start:end] = family.visual_tokens(pixels)
            hidden = family.model.model.language_model(
                inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions.squeeze(0)
            ).last_hidden_state
            said = family.model.lm_head(hidden).argmax(-1)[0, :-1]
        expected = packed.labels[0, 1:]
        agree, last = (said == expected)[expected != -100], expected[expected != -100] == tokenizer.eos_token_id
        right += [bool(part.all()) for part in agree.tensor_split(last.nonzero().flatten() + 1)[:-1]]
    assert len(right) > 500
    assert np.mean(right) > 0.89


@pytest.mark.parametrize(("name", "sizes"), [("tiny-llava", "square"), ("tiny-qwen2.5-vl", "mixed")])
def test_shipped_folder_generates_answers(name: str, sizes: Literal["square", "mixed"]):
    """Loaded and asked as anybody would."""
    folder = testbed.checkpoint(testbed.PREFIX + name)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    drawn = [scenes.scene_at(20_000, index, sizes) for index in range(12)]
    asked = [scenes.ask(scene, np.random.default_rng(0), 1)[0] for scene, _ in drawn]
    texts = [prompt(processor, question.text) for question in asked]
    inputs = processor(images=[image for _, image in drawn], text=texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        tokens = model.float().generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(tokens, skip_special_tokens=True)
    assert sum(answer == question.answer for answer, question in zip(answers, asked, strict=True)) >= 10


def test_shipped_models_are_all_named_and_small():
    assert testbed.names() == [testbed.PREFIX + name for name in sorted(BUILDERS)]
    for name in BUILDERS:
        assert sum(path.stat().st_size for path in testbed.checkpoint(name).iterdir()) < 6e6


@pytest.mark.parametrize("name", BUILDERS)
def test_shipped_files_are_what_the_builders_build(name: str):
    build_model, build_processor = BUILDERS[name]
    model, processor = build_model(), build_processor()
    shipped = AutoModelForImageTextToText.from_pretrained(testbed.checkpoint(name))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}
    for part in ("vision_config", "text_config"):
        built, stored = (getattr(m.config, part).to_dict() for m in (model, shipped))
        assert {k: v for k, v in built.items() if k != "dtype"} == {k: v for k, v in stored.items() if k != "dtype"}
    loaded = AutoProcessor.from_pretrained(testbed.checkpoint(name))
    assert type(loaded) is type(processor)
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert loaded.tokenizer.padding_side == processor.tokenizer.padding_side == "left"
    assert loaded.chat_template == processor.chat_template
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()


# ── Text and images ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", BUILDERS)
def test_every_question_and_answer_is_in_the_vocabulary(name: str):
    tokenizer = BUILDERS[name][1]().tokenizer
    for index in range(60):
        scene, _ = scenes.scene_at(3, index)
        for question in scenes.ask(scene, np.random.default_rng(index), 7):
            for text in (question.text, question.answer):
                assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text
            assert tokenizer.decode(tokenizer(question.answer).input_ids) == question.answer


def test_qwen_prompt_wraps_as_many_placeholders_as_the_image_has_cells():
    processor, config = testbed.build_qwen_processor(), testbed.build_qwen_model(hidden_size=32, heads=2).config
    _, image = next(s for i in range(99) if (s := scenes.scene_at(3, i, "mixed"))[1].size == (154, 84))
    text = prompt(processor, "What color is the circle?")
    ids = processor(images=[image], text=[text], return_tensors="pt")["input_ids"][0].tolist()
    words = processor.tokenizer("What color is the circle?").input_ids
    user, assistant = processor.tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    image_part = [config.vision_start_token_id, *[config.image_token_id] * (11 * 6), config.vision_end_token_id]
    assert ids == [config.text_config.bos_token_id, *image_part, user, *words, assistant]


@pytest.mark.parametrize("size", scenes.MIXED_SIZES)
def test_qwen_image_processor_leaves_the_size_of_scenes(size: tuple[int, int]):
    processor = testbed.build_qwen_processor().image_processor
    index = next(i for i in range(99) if scenes.mixed_size(3, i) == size)
    encoded = processor([scenes.scene_at(3, index, "mixed")[1]], return_tensors="pt")
    assert encoded["image_grid_thw"].tolist() == [[1, size[1] // 7, size[0] // 7]]


def test_qwen_windows_are_four_tokens_and_the_last_block_sees_everything():
    for depth in (2, 3, 5):
        vision = testbed.build_qwen_model(depth=depth, hidden_size=32, heads=2).config.vision_config
        assert vision.window_size // vision.patch_size // vision.spatial_merge_size == 4
        assert vision.fullatt_block_indexes[-1] == depth - 1
        assert 0 not in vision.fullatt_block_indexes
