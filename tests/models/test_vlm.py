import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import (
    VisualTokens,
    answer,
    answer_loss,
    check_model,
    load,
    preprocess,
    prompt_ids,
    resolve,
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


def test_answers_equal_generate_on_pixels(trained_vlm, scene_split):
    """The cut between tower and language model changes nothing."""
    from infoprune_export.models.calibration import inputs_of

    samples = scene_split.validation[:3]
    inputs = inputs_of(trained_vlm, samples)
    for row, sample in enumerate(samples):
        question = sample.questions[0].text
        ids = torch.tensor([prompt_ids(trained_vlm, question, 64)])
        with torch.inference_mode():
            whole = trained_vlm.model.generate(
                input_ids=ids, pixel_values=inputs["pixel_values"][row : row + 1], do_sample=False, max_new_tokens=8
            )
        expected = trained_vlm.processor.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()
        with torch.inference_mode():
            features = trained_vlm.tower.features({"pixel_values": inputs["pixel_values"][row : row + 1]})
        assert answer(trained_vlm, VisualTokens(features), [question]) == [expected]


def test_batched_answers_equal_single_ones(trained_vlm, scene_split):
    from infoprune_export.models.calibration import inputs_of

    sample = scene_split.validation[0]
    with torch.inference_mode():
        features = trained_vlm.tower.features(inputs_of(trained_vlm, [sample]))
    questions = [q.text for q in sample.questions]
    visual = VisualTokens(features)
    together = answer(trained_vlm, visual.rows([0] * len(questions)), questions)
    assert together == [answer(trained_vlm, visual, [question])[0] for question in questions]


def test_keeping_every_token_at_its_position_changes_nothing(trained_vlm, pixels):
    with torch.inference_mode():
        features = trained_vlm.tower.features(pixels)
    positions = torch.arange(64).expand(3, 64)
    questions = ["How many objects are there?", "Is there a ring in the image?", "What word is on the sign?"]
    assert answer(trained_vlm, VisualTokens(features, positions, 64), questions) == answer(
        trained_vlm, VisualTokens(features), questions
    )


def test_kept_positions_reach_the_language_model(trained_vlm):
    from infoprune_export.models.vlm import _position_ids

    rows = [[2, 4, 4, 5, 6], [4, 4, 9]]
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    visual = VisualTokens(torch.zeros(2, 2, 8), torch.tensor([[3, 7], [0, 9]]), total=10)
    ids = _position_ids(trained_vlm, rows, mask, visual)
    assert ids[0].tolist() == [0, 1 + 3, 1 + 7, 11, 12]
    assert ids[1, 2:].tolist() == [0, 9, 10]


def test_answer_loss_is_lower_for_the_models_own_answer(trained_vlm, pixels):
    with torch.inference_mode():
        features = trained_vlm.tower.features(pixels)[:1]
    question = "What color is the circle?"
    own = answer(trained_vlm, VisualTokens(features), [question])[0]
    other = next(word for word in ("zoo", "stop") if word != own)
    assert answer_loss(trained_vlm, features, [question], [own]) < answer_loss(
        trained_vlm, features, [question], [other]
    )


def test_answer_loss_does_not_depend_on_padding(trained_vlm, pixels):
    with torch.inference_mode():
        features = trained_vlm.tower.features(pixels)[:2]
        questions, answers = ["Is there a ring?", "What color is the circle on the sign?"], ["yes", "42"]
        both = answer_loss(trained_vlm, features, questions, answers)
        single = [answer_loss(trained_vlm, features[i : i + 1], [questions[i]], [answers[i]]) for i in range(2)]
    # 2 and 3 target tokens, end of sequence included
    torch.testing.assert_close(both, (2 * single[0] + 3 * single[1]) / 5, rtol=1e-4, atol=1e-5)


def test_preprocess_refuses_an_image_that_comes_out_in_the_wrong_size(checkpoint):
    config = json.loads((checkpoint / "processor_config.json").read_text())
    config["image_processor"] |= {"do_resize": False, "do_center_crop": False}
    (checkpoint / "processor_config.json").write_text(json.dumps(config))
    vlm = load(spec(checkpoint))
    with pytest.raises(InfopruneError, match=r"\[1, 3, 40, 60\]"):
        preprocess(vlm, [Image.new("RGB", (60, 40))])
