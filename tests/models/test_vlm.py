import json
import shutil

import pytest
import torch
from families import FAMILIES, build
from PIL import Image
from safetensors.torch import load_file, save_file

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.models import tower_of
from infoprune_export.models.vlm import (
    VLM,
    VisualTokens,
    answer,
    answer_loss,
    check_model,
    load,
    preprocess,
    prompt_ids,
    resolve,
    writable_copy,
)
from infoprune_export.recipe import ModelSpec


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(testbed.checkpoint("testbed/tiny-llava"), tmp_path / "model")


def spec(path):
    return ModelSpec(name_or_path=str(path))


# ── Loading ──


def test_shipped_model_and_processor_load_with_plain_hugging_face():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = testbed.checkpoint("testbed/tiny-llava")
    assert AutoModelForImageTextToText.from_pretrained(path).config.model_type == "llava"
    assert AutoProcessor.from_pretrained(path).image_token == "<image>"


def test_shipped_checkpoint_is_fp16_and_at_most_5_mb():
    files = list(testbed.checkpoint("testbed/tiny-llava").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 5_000_000
    assert {t.dtype for f in files for t in load_file(f).values()} == {torch.float16}


def test_a_missing_tensor_is_an_error_that_names_it(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(k for k in tensors if "q_proj" in k)
    del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InfopruneError, match=r"missing tensors: .*q_proj"):
        load(spec(checkpoint))


def test_a_renamed_tensor_is_an_error(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["vision_tower.encoder.layers.77.weight"] = tensors.pop(next(k for k in tensors if "fc1" in k))
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InfopruneError, match="missing|unexpected"):
        load(spec(checkpoint))


def test_a_tensor_of_the_wrong_shape_is_an_error(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(k for k in tensors if "fc1.weight" in k)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InfopruneError, match="cannot be loaded"):
        load(spec(checkpoint))


def test_truncated_weights_are_an_error(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InfopruneError, match="cannot be loaded"):
        load(spec(checkpoint))


def test_a_processor_without_chat_template_is_an_error(checkpoint):
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(InfopruneError, match="no chat template"):
        load(spec(checkpoint))


def test_a_model_that_is_no_vlm_is_refused_before_loading(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InfopruneError, match="'bert'"):
        check_model(spec(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}'])
def test_a_damaged_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InfopruneError, match=r"config\.json"):
        check_model(spec(tmp_path))


def test_pickled_weights_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(InfopruneError, match="safetensors"):
        check_model(spec(checkpoint))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "testbed/unknown"])
def test_paths_that_do_not_exist_are_refused(name):
    with pytest.raises(InfopruneError, match="no "):
        resolve(name)


def test_a_hub_id_is_left_to_the_hub():
    assert resolve("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"


# ── Prompts and answers ──


def test_prompt_equals_the_processors_own(trained_vlm):
    image = Image.new("RGB", (112, 112))
    content = [{"type": "image"}, {"type": "text", "text": "What word is on the sign?"}]
    processor = trained_vlm.processor
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(text=[text], images=[image], return_tensors="pt").input_ids[0].tolist()
    assert prompt_ids(trained_vlm, "What word is on the sign?", 64) == expected


def visible(vlm, inputs):
    """All visual tokens of a batch of square images."""
    with torch.inference_mode():
        return VisualTokens.of(list(vlm.tower.features_of(inputs)), vlm.tower.layouts(inputs))


def test_answers_equal_generate_on_pixels(trained_vlm, scene_split):
    """The cut between tower and language model changes nothing."""
    from infoprune_export.models.calibration import inputs_of

    samples = scene_split.validation[:3]
    inputs = inputs_of(trained_vlm, samples)
    for row, sample in enumerate(samples):
        question = sample.questions[0].text
        ids = torch.tensor([prompt_ids(trained_vlm, question, 64)])
        one = {"pixel_values": inputs["pixel_values"][row : row + 1]}
        with torch.inference_mode():
            whole = trained_vlm.model.generate(input_ids=ids, **one, do_sample=False, max_new_tokens=8)
        expected = trained_vlm.processor.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert answer(trained_vlm, visible(trained_vlm, one), [question]) == [expected]


def test_batched_answers_equal_single_ones(trained_vlm, scene_split):
    from infoprune_export.models.calibration import inputs_of

    sample = scene_split.validation[0]
    questions = [q.text for q in sample.questions]
    visual = visible(trained_vlm, inputs_of(trained_vlm, [sample]))
    together = answer(trained_vlm, visual.rows([0] * len(questions)), questions)
    assert together == [answer(trained_vlm, visual, [question])[0] for question in questions]


def test_keeping_every_token_at_its_position_changes_nothing(trained_vlm, pixels):
    visual = visible(trained_vlm, pixels)
    kept = VisualTokens.of(visual.features, visual.layouts, [torch.arange(64)] * 3)
    questions = ["How many objects are there?", "Is there a ring in the image?", "What word is on the sign?"]
    assert answer(trained_vlm, kept, questions) == answer(trained_vlm, visual, questions)


def test_answer_loss_is_lower_for_the_models_own_answer(trained_vlm, pixels):
    visual = visible(trained_vlm, pixels).rows([0])
    question = "What color is the circle?"
    own = answer(trained_vlm, visual, [question])[0]
    other = next(word for word in ("zoo", "stop") if word != own)
    assert answer_loss(trained_vlm, visual, [question], [own]) < answer_loss(trained_vlm, visual, [question], [other])


def test_answer_loss_does_not_depend_on_padding(trained_vlm, pixels):
    visual = visible(trained_vlm, pixels).rows([0, 1])
    questions, answers = ["Is there a ring?", "What color is the circle on the sign?"], ["yes", "42"]
    with torch.inference_mode():
        both = answer_loss(trained_vlm, visual, questions, answers)
        single = [answer_loss(trained_vlm, visual.rows([i]), [questions[i]], [answers[i]]) for i in range(2)]
    # 2 and 3 target tokens, end of sequence included
    torch.testing.assert_close(both, (2 * single[0] + 3 * single[1]) / 5, rtol=1e-4, atol=1e-5)


def test_answer_loss_is_differentiable_in_the_features(trained_vlm, pixels):
    visual = visible(trained_vlm, pixels).rows([0])
    features = visual.features[0].clone().requires_grad_()
    loss = answer_loss(trained_vlm, VisualTokens(features[None], visual.layouts), ["Is there a ring?"], ["yes"])
    loss.backward()
    assert features.grad.abs().amax(1).min() > 0


def test_preprocess_refuses_an_image_that_comes_out_in_the_wrong_size(checkpoint):
    config = json.loads((checkpoint / "processor_config.json").read_text())
    config["image_processor"] |= {"do_resize": False, "do_center_crop": False}
    (checkpoint / "processor_config.json").write_text(json.dumps(config))
    vlm = load(spec(checkpoint))
    with pytest.raises(InfopruneError, match=r"\[1, 3, 40, 60\]"):
        preprocess(vlm, [Image.new("RGB", (60, 40))])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_writable_copy_leaves_the_original_as_it_is(name):
    vlm = VLM(model := build(name), None, tower_of(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copy = writable_copy(vlm)
    copy.tower.blocks[0].keep_heads([])
    copy.tower.blocks[1].keep_neurons([0])
    copy.tower.blocks[-1].set_ffn_out(torch.zeros_like(copy.tower.blocks[-1].ffn_out.weight), torch.ones(64))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    inside = {id(p) for block in vlm.tower.blocks for p in block.module.parameters()}
    own = {id(p) for p in model.parameters()} - inside
    assert own == own & {id(p) for p in copy.model.parameters()}  # everything else is shared


def test_images_of_several_sizes_are_preprocessed_as_one_batch():
    model = testbed.build_qwen_model()
    vlm = VLM(model, testbed.build_qwen_processor(), tower_of(model))
    inputs = preprocess(vlm, [Image.new("RGB", size) for size in ((112, 112), (84, 140))])
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 16], [1, 20, 12]]
    assert [layout.ids.shape[1] for layout in vlm.tower.layouts(inputs)] == [64, 60]
