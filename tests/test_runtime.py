"""A finished run as one object: it answers as PyTorch does with the same selection and Stage 2, or is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from finished import STAGE_2, execute_quickstart, finished, small
from PIL import Image

from infoprune_export import runtime
from infoprune_export.cli import main
from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import VLM, VisualTokens, answer, preprocess
from infoprune_export.pipeline import load_vlm
from infoprune_export.recipe import ModelSpec
from infoprune_export.runtime import CompressedVLM, open_run
from infoprune_export.tokens.decoder import decoding
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.tokens.steps import Step

WORDS = 4


@dataclass(frozen=True)
class Opened:
    """A run as users open it, and what it is held to."""

    folder: Path
    model: CompressedVLM
    whole: VLM
    """The checkpoint with all its weights."""

    @property
    def images(self) -> list[Path]:
        return sorted((self.folder / "data" / "images").glob("*.png"))

    def seen(self, images: list[Path]) -> VisualTokens:
        pictures = [Image.open(path).convert("RGB") for path in images]
        with torch.inference_mode():
            return VisionEncoder(self.whole.tower, self.model.recipe.tokens).encode(preprocess(self.whole, pictures))

    def expected(self, images: list[list[Path]], questions: list[str]) -> list[str]:
        """The answers of PyTorch alone, of at most `WORDS` tokens."""
        spec, inside = self.model.recipe.decoder, None
        if spec.method != "none":
            layer = json.loads((self.folder / "decoder" / "layer.json").read_text())["layer"]
            inside = decoding([Step(layer, spec.keep_ratio)])
        visual = self.seen([image for row in images for image in row])
        return answer(self.whole, visual, questions, WORDS, inside, [len(row) for row in images])


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory) -> Path:
    return finished(tmp_path_factory)


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory) -> Path:
    """The same without Stage 2, up to its engine."""
    folder = tmp_path_factory.mktemp("stage-1") / "run"
    donor = finished(tmp_path_factory)
    execute_quickstart(folder, "engine", *small(donor.parent), donor=donor)
    assert not (folder / "decoder").exists()
    return folder


def opened(folder: Path) -> Opened:
    spec = ModelSpec(name_or_path=str(folder / "checkpoint"))
    return Opened(folder, open_run(folder), load_vlm(spec, "cpu"))


@pytest.fixture(scope="module")
def with_stage_2(stage_2) -> Opened:
    return opened(stage_2)


@pytest.fixture(scope="module")
def without_stage_2(stage_1) -> Opened:
    return opened(stage_1)


@pytest.fixture(params=["with_stage_2", "without_stage_2"])
def either(request) -> Opened:
    return request.getfixturevalue(request.param)


def asked(run: Opened) -> tuple[list[list[Path]], list[str]]:
    """The questions of some validation images, each with its image."""
    samples = dataset.read(run.model.recipe.data, run.folder / "data").validation
    pairs = [([sample.image], question.text) for sample in samples for question in sample.questions]
    return [image for image, _ in pairs], [question for _, question in pairs]


def refusal(caught: pytest.ExceptionInfo[InfopruneError], *named: object) -> None:
    message = str(caught.value)
    assert message.splitlines() == [message]
    for part in named:
        assert str(part) in message, message


# ── Answers ──────────────────────────────────────────────────────────────────


def test_visual_tokens_are_those_of_pytorch(either):
    actual, expected = either.model.encode(either.images[:4]), either.seen(either.images[:4])
    assert len({len(features) for features in actual.features}) > 1, "images of several sizes"
    for mine, theirs in zip(actual.features, expected.features, strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()
    for mine, theirs in zip(actual.layouts, expected.layouts, strict=True):
        assert torch.equal(mine.ids, theirs.ids)
        assert mine.advance == theirs.advance


def test_answers_are_those_of_pytorch(either):
    images, questions = asked(either)
    answers = either.model.answer_all(images, questions, WORDS)
    assert answers == either.expected(images, questions)
    assert len(set(answers)) > 5


def test_stage_2_is_at_work_only_where_the_recipe_has_it(with_stage_2, without_stage_2):
    assert with_stage_2.model.decoder is not None
    assert without_stage_2.model.decoder is None
    images, questions = asked(with_stage_2)
    first, second = (run.model.answer_all(images, questions, WORDS) for run in (with_stage_2, without_stage_2))
    assert first != second


def test_an_image_is_a_path_a_name_or_a_picture(either):
    path = either.images[3]
    with Image.open(path) as picture:
        forms = [path, str(path), picture.copy(), picture.convert("RGBA"), [path], [picture.copy()]]
    question = "What color is the circle?"
    expected = either.expected([[path]], [question])
    assert [either.model.answer(form, question, WORDS) for form in forms] == expected * len(forms)


def test_pictures_reach_the_processor_in_rgb(without_stage_2, monkeypatch):
    """Not every model's processor converts them."""

    def spy(vlm, pictures, *arguments):
        modes.extend(picture.mode for picture in pictures)
        return preprocess(vlm, pictures, *arguments)

    modes: list[str] = []
    monkeypatch.setattr(runtime, "preprocess", spy)
    grey = Image.open(without_stage_2.images[0]).convert("L")
    seen = without_stage_2.model.encode([grey, grey.convert("P"), grey.convert("RGB")]).features
    assert modes == ["RGB"] * 3
    assert torch.equal(seen[0], seen[2])


def test_several_images_in_one_question(either):
    images = [either.images[:3], [either.images[3]], either.images[2:4]]
    questions = ["How many objects are there?", "What color is the circle?", "What word is on the sign?"]
    expected = either.expected(images, questions)
    assert either.model.answer_all(images, questions, WORDS) == expected
    assert [either.model.answer(row, text, WORDS) for row, text in zip(images, questions, strict=True)] == expected


def test_a_batch_is_answered_as_one_at_a_time(either):
    images, questions = (rows[:9] for rows in asked(either))
    together = either.model.answer_all(images, questions, WORDS)
    assert together == [either.model.answer(row, text, WORDS) for row, text in zip(images, questions, strict=True)]
    assert either.model.answer_all([image for (image,) in images], questions, WORDS) == together


def test_an_answer_is_no_longer_than_asked_for(without_stage_2):
    tokenizer = without_stage_2.whole.processor.tokenizer
    for count in (1, 2):
        text = without_stage_2.model.answer(without_stage_2.images[:2], "What number is on the sign?", count)
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == count


# ── The object ───────────────────────────────────────────────────────────────


def test_only_the_weights_of_the_vision_blocks_are_dropped(either):
    model, tower = either.model.vlm.model, either.model.vlm.tower
    dropped = {id(parameter) for block in tower.blocks for parameter in block.module.parameters()}
    assert len(dropped) > 10
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == (id(parameter) in dropped), name


def test_another_dtype_is_the_language_models_alone(with_stage_2):
    model = open_run(with_stage_2.folder, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.vlm.model.parameters()} == {torch.bfloat16}
    images = with_stage_2.images[:2]
    seen, expected = model.encode(images), with_stage_2.model.encode(images)
    assert all(torch.equal(*pair) for pair in zip(seen.features, expected.features, strict=True))
    assert model.answer(images, "How many objects are there?", WORDS)


def test_the_folder_may_be_a_name(stage_1, monkeypatch):
    monkeypatch.chdir(stage_1.parent)
    assert open_run(stage_1.name).recipe == open_run(stage_1).recipe


# ── Refused: folders ─────────────────────────────────────────────────────────


@pytest.fixture
def copy(stage_2, tmp_path) -> Path:
    """A run to be spoilt."""
    return shutil.copytree(stage_2, tmp_path / "run")


def test_a_folder_that_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InfopruneError) as caught:
            open_run(folder)
        refusal(caught, folder / "recipe.json", "name the folder of a run")


@pytest.mark.parametrize("stage", ["checkpoint", "onnx", "engine", "decoder"])
def test_an_unfinished_run(copy, stage):
    (copy / stage / "manifest.json").unlink()
    with pytest.raises(InfopruneError) as caught:
        open_run(copy)
    refusal(caught, copy, f"no finished {stage}", f"infoprune-export build RECIPE -o {copy}")


@pytest.mark.parametrize(
    "name", ["checkpoint/model.safetensors", "engine/engine.onnx.data", "decoder/layer.json", "onnx/golden.safetensors"]
)
def test_a_damaged_or_missing_file_is_named(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InfopruneError) as caught:
        open_run(copy)
    refusal(caught, copy / name, "corrupt")
    (copy / name).unlink()
    with pytest.raises(InfopruneError) as caught:
        open_run(copy)
    refusal(caught, copy / name, "missing")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"name": 3}', b"\xff", b"3"])
def test_a_damaged_recipe(copy, content):
    (copy / "recipe.json").write_bytes(content)
    with pytest.raises(InfopruneError) as caught:
        open_run(copy)
    refusal(caught, copy / "recipe.json")


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ({"tokens": {"method": "none"}}, "onnx"),
        ({"tokens": {"keep_ratio": "1/4"}}, "onnx"),
        ({"export": {"opset": 19}}, "onnx"),
        ({"decoder": {"keep_ratio": "1/4"}}, "decoder"),
    ],
)
def test_settings_that_changed_after_the_engine_was_built(copy, change, stage):
    """As `bench --set` leaves a run: recipe.json is the new one, the engine is not."""
    tree = json.loads((copy / "recipe.json").read_text())
    for section, values in change.items():
        tree[section] |= values
    (copy / "recipe.json").write_text(json.dumps(tree))
    with pytest.raises(InfopruneError) as caught:
        open_run(copy)
    refusal(caught, copy / stage, "settings were changed", "build RECIPE")


def test_stages_of_different_runs_are_not_mixed(copy, tmp_path):
    """The checkpoint was made anew, the ONNX file was not."""
    manifest = json.loads((copy / "checkpoint" / "manifest.json").read_text())
    manifest["inputs"]["heads"] = "0" * 64
    (copy / "checkpoint" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InfopruneError) as caught:
        open_run(copy)
    refusal(caught, copy / "onnx", "build RECIPE")


def test_build_makes_what_open_run_asks_for(stage_2, copy):
    shutil.rmtree(copy / "decoder")
    shutil.rmtree(copy / "validation")
    with pytest.raises(InfopruneError, match="no finished decoder"):
        open_run(copy)
    overrides = [word for setting in (*small(stage_2.parent), *STAGE_2) for word in ("--set", setting)]
    result = CliRunner().invoke(main, ["build", "quickstart-qwen", *overrides, "-o", str(copy)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(copy / "engine")
    assert open_run(copy).decoder is not None
    assert not (copy / "validation").exists()


def test_a_device_that_is_not_there(stage_1, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InfopruneError, match="no CUDA device"):
        open_run(stage_1, device="cuda")


# ── Refused: questions ───────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("images", "questions", "named"),
    [
        ([], [], "0 questions, 0 lists of images"),
        ([[]], ["What is it?"], "the shortest of 0"),
        (["a.png", []], ["What is it?"] * 2, "the shortest of 0"),
        (["a.png"], ["What is it?"] * 2, "2 questions, 1 lists of images"),
        (["a.png"] * 2, ["What is it?"], "1 questions, 2 lists of images"),
    ],
)
def test_a_question_without_an_image(without_stage_2, images, questions, named):
    with pytest.raises(InfopruneError) as caught:
        without_stage_2.model.answer_all(images, questions)
    refusal(caught, named, "at least one image")


def test_nothing_to_look_at(without_stage_2):
    for look in (lambda: without_stage_2.model.encode([]), lambda: without_stage_2.model.answer([], "What is it?")):
        with pytest.raises(InfopruneError) as caught:
            look()
        refusal(caught, "at least one")


def test_an_image_that_cannot_be_read(without_stage_2, tmp_path):
    good = without_stage_2.images[0]
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("no image")
    for path in (tmp_path / "half.png", tmp_path / "text.jpg", tmp_path / "none.png", tmp_path):
        for form in (path, str(path), [good, path]):
            with pytest.raises(InfopruneError) as caught:
                without_stage_2.model.answer(form, "What is it?")
            refusal(caught, path)


def test_a_question_with_the_image_placeholder_in_it(without_stage_2):
    placeholder = without_stage_2.whole.processor.image_token
    with pytest.raises(InfopruneError) as caught:
        without_stage_2.model.answer(without_stage_2.images[0], f"{placeholder} What is it?")
    refusal(caught, placeholder, "leave it out")
