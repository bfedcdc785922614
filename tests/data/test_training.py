"""Training: labels, packing, and the two families' forwards against the models' own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoProcessor, PaddleOCRVLProcessor

from infoprune_export.data import scenes, testbed
from infoprune_export.data.train_testbed import main
from infoprune_export.data.training.batches import SceneStream, background_left_out, pack_questions
from infoprune_export.data.training.families import FAMILIES, Llava, Qwen
from infoprune_export.data.training.labels import (
    NOTHING,
    PATCH_LABELS,
    caption,
    grid_of,
    image_labels,
    patch_labels,
)
from infoprune_export.data.training.loop import DECODER, SPARSE, normalise, train_answers, train_tower


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[int, int], tuple[scenes.Scene, Image.Image]]:
    """One scene of each mixed size."""
    return {image.size: (scene, image) for scene, image in (scenes.scene_at(4, i, "mixed") for i in range(40))}


@pytest.fixture(scope="module")
def qwen() -> Qwen:
    family = Qwen(seed=2)
    family.model.eval()
    with torch.no_grad():
        for name, parameter in family.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)  # zero in an untrained model, and then a forgotten one would not show
    return family


# ── Labels ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sizes", ["square", "mixed"])
def test_patch_labels_point_at_the_objects(sizes):
    for index in range(40):
        scene, _ = scenes.scene_at(4, index, sizes)
        labels = patch_labels(scene)
        _, columns = grid_of(scene)
        assert (labels >= 0).all()
        assert (labels < list(PATCH_LABELS.values())).all()
        for item in scene.items:
            patch = int(item.y // 14) * columns + int(item.x // 14)
            assert labels[patch, 0] == scenes.SHAPES.index(item.shape)
            assert labels[patch, 1] == list(scenes.COLORS).index(item.color)
            assert labels[patch, 5:].tolist() == [item.x // 14, item.y // 14]
        if (sign := scene.sign) is not None:
            word, tens, ones = labels[int(sign.y // 14) * columns + int(sign.x // 14), 2:5]
            read = f"{tens}{ones}" if sign.is_number else scenes.WORDS[word]
            assert read == sign.text


def test_image_labels_count_objects_and_signs(drawn):
    for scene, _ in drawn.values():
        sign = 0 if scene.sign is None else 2 if scene.sign.is_number else 1
        assert image_labels(scene).sum() == len(scene.items) + sign


def test_caption_goes_from_left_to_right(drawn):
    scene, _ = drawn[154, 84]
    leftmost = min(scene.items, key=lambda item: item.x)
    assert caption(scene).startswith(f"{leftmost.color} {leftmost.shape} ,")


# ── Batches ──────────────────────────────────────────────────────────────────


def test_stream_serves_every_scene_in_batches_of_one_size():
    stream = SceneStream(60, seed=4, sizes="mixed")
    expected = Counter(scenes.mixed_size(4, i) for i in range(60))
    seen = Counter()
    for _ in range(60):
        batch, pixels = stream.batch(3)
        assert pixels.shape == (3, 3, batch[0].height, batch[0].width)
        assert len({(scene.width, scene.height) for scene in batch}) == 1
        seen[batch[0].width, batch[0].height] += 1
    assert set(seen) == set(expected)
    with pytest.raises(ValueError, match="cannot fill a batch of 61"):
        stream.batch(61)


def test_stream_pairs_scenes_with_their_pixels():
    batch, pixels = SceneStream(12, seed=4, sizes="square").batch(12)
    every = [scenes.scene_at(4, i) for i in range(12)]
    assert {scene: image.numpy().tobytes() for scene, image in zip(batch, pixels, strict=True)} == {
        scene: np.asarray(image).transpose(2, 0, 1).tobytes() for scene, image in every
    }


@pytest.mark.parametrize("sizes", ["square", "mixed"])
def test_only_background_is_ever_left_out(sizes):
    rng = np.random.default_rng(0)
    every = [scenes.scene_at(5, index, sizes)[0] for index in range(40)]
    batch = [scene for scene in every if grid_of(scene) == grid_of(every[0])][:6]
    counts = set()
    for _ in range(20):
        kept = background_left_out(batch, rng).numpy()
        counts.add(kept.shape[1])
        for scene, tokens in zip(batch, kept, strict=True):
            labels = patch_labels(scene)
            dropped = np.setdiff1d(np.arange(len(labels)), tokens)
            assert (labels[dropped, :5] == NOTHING).all()
            assert (np.diff(tokens) > 0).all()
    assert len(counts) > 5


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_questions_do_not_see_each_other(name):
    family = FAMILIES[name](0)
    tokenizer, prefix = family.processor.tokenizer, family.prefix(2, 3)
    asked = [[("What color is the circle?", "red", 1.0), ("How many objects are there?", "4", 1.0)]]
    packed = pack_questions(tokenizer, asked, prefix)
    start = len(prefix.ids)
    second = int((packed.ids[0] == tokenizer.convert_tokens_to_ids("<user>")).nonzero()[1])
    visible = packed.mask[0, 0] == 0
    assert visible[second:, :start].all(), "every question sees the image"
    assert not visible[second:, start:second].any(), "and not the question before it"
    assert not torch.triu(visible, 1).any(), "nor the future"
    assert (packed.positions[:, 0, second] == prefix.next_position).all()
    assert (packed.positions[:, 0, start] == prefix.next_position).all()
    answered = packed.labels[0] != -100
    assert tokenizer.decode(packed.labels[0][answered]).split() == ["red", "</s>", "4", "</s>"]
    assert (packed.weights[0][answered] == 1).all()


def test_selected_tokens_keep_their_positions_and_what_they_see():
    family = FAMILIES["tiny-qwen2.5-vl"](0)
    asked = [[("How many objects are there?", "4", 1.0)]] * 2
    packed = pack_questions(family.processor.tokenizer, asked, family.prefix(2, 3))
    kept = torch.tensor([[0, 1, 3, 8, 9, 12], [0, 1, 2, 8, 10, 11]])
    chosen = packed.select(kept)
    for row in range(2):
        assert torch.equal(chosen.ids[row], packed.ids[row, kept[row]])
        assert torch.equal(chosen.positions[:, row], packed.positions[:, row, kept[row]])
        assert torch.equal(chosen.mask[row, 0], packed.mask[row, 0][kept[row]][:, kept[row]])


# ── Families ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", scenes.MIXED_SIZES)
def test_dense_tower_computes_what_the_model_computes(qwen: Qwen, drawn, size):
    images = [drawn[size][1], drawn[size][1].transpose(Image.Transpose.ROTATE_180)]
    encoded = qwen.processor.image_processor(images, return_tensors="pt")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with torch.no_grad():
        ours = qwen.visual_tokens(normalise(qwen, pixels))
        own = qwen.model.get_image_features(**encoded).pooler_output
    torch.testing.assert_close(ours, torch.stack(list(own)), atol=1e-5, rtol=1e-5)
    assert own[0].std() > 0.01


@pytest.mark.parametrize("size", scenes.MIXED_SIZES)
def test_packed_prompt_is_the_processors_with_the_models_positions(qwen: Qwen, drawn, size):
    scene, image = drawn[size]
    question = "How many objects are there?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = qwen.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    encoded = qwen.processor(images=[image], text=[text], return_tensors="pt")
    positions, _ = qwen.model.model.get_rope_index(
        encoded["input_ids"], encoded["mm_token_type_ids"], encoded["image_grid_thw"]
    )
    packed = pack_questions(qwen.processor.tokenizer, [[(question, "4", 1.0)]], qwen.prefix(*grid_of(scene)))
    length = encoded["input_ids"].shape[1]
    assert torch.equal(packed.ids[:, :length], encoded["input_ids"])
    assert torch.equal(packed.positions[:, :, :length], positions)


def test_llava_features_are_those_the_model_selects(drawn):
    family = Llava(seed=2)
    family.model.eval()
    image = drawn[112, 112][1]
    pixels = torch.from_numpy(np.array(image)[None]).permute(0, 3, 1, 2)
    encoded = family.processor.image_processor([image], return_tensors="pt")
    with torch.no_grad():
        ours = family.visual_tokens(normalise(family, pixels))
        own = family.model.get_image_features(**encoded).pooler_output
    torch.testing.assert_close(ours, torch.stack(list(own)), atol=1e-4, rtol=1e-4)


# ── Loops ────────────────────────────────────────────────────────────────────


def small(name: str, monkeypatch: pytest.MonkeyPatch) -> Llava | Qwen:
    """The family on a narrow tower."""
    qwen, llava = testbed.build_qwen_model, testbed.build_model
    monkeypatch.setattr(testbed, "build_qwen_model", lambda seed: qwen(depth=3, hidden_size=32, heads=2, seed=seed))
    monkeypatch.setattr(testbed, "build_model", lambda seed: llava(layers=3, hidden_size=32, heads=2, seed=seed))
    family = FAMILIES[name](1)
    family.model.set_attn_implementation("eager")
    return family


@pytest.mark.parametrize("name", FAMILIES)
def test_each_stage_trains_what_it_should(name, monkeypatch):
    family = small(name, monkeypatch)
    stream = SceneStream(42, seed=4, sizes=family.scene_sizes)

    def changed(train) -> set[str]:
        before = {name: p.detach().clone() for name, p in family.model.named_parameters()}
        train()
        assert all(torch.isfinite(p).all() for p in family.model.parameters())
        moved = {name for name, p in family.model.named_parameters() if not torch.equal(before[name], p)}
        return {"tower" if "vis" in name else "decoder" if "language" in name else "projector" for name in moved}

    rest = {"decoder", "projector"} if family.projector is not None else {"decoder"}
    assert changed(lambda: train_tower(family, stream, 2, 2)) == {"tower"}
    assert changed(lambda: train_answers(family, stream, 2, 2, DECODER)) == rest
    assert changed(lambda: train_answers(family, stream, 3, 2, SPARSE)) == rest


def test_a_tower_learns_patch_labels(monkeypatch):
    family = small("tiny-qwen2.5-vl", monkeypatch)
    stream = SceneStream(42, seed=4, sizes="mixed")
    assert train_tower(family, stream, 1, 2) > 3.2
    assert train_tower(family, stream, 60, 2, lr=1e-2, muon_lr=2e-2) < 2.9


def test_an_interrupted_run_starts_again_where_it_was(monkeypatch, tmp_path: Path):
    small("tiny-qwen2.5-vl", monkeypatch)
    command = ["tiny-qwen2.5-vl", str(tmp_path / "out" / "model"), "--batch-size", "1", "--pool", "14"]
    first = CliRunner().invoke(main, [*command, "--steps", "1", "1", "1", "1"], catch_exceptions=False)
    assert first.exit_code == 0
    kept = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert [name[: len("model.stage1")] for name in kept] == [f"model.stage{stage}" for stage in (1, 2, 3, 4)]
    assert type(AutoProcessor.from_pretrained(tmp_path / "out" / "model")) is PaddleOCRVLProcessor
    (tmp_path / "out" / kept[-1]).unlink()
    second = CliRunner().invoke(main, [*command, "--steps", "1", "1", "1", "1"], catch_exceptions=False)
    assert second.exit_code == 0
    assert "drawing 14 scenes" in second.output
    assert second.output.count("drawing") == 1
    (tmp_path / "out" / kept[-1]).unlink()
    third = CliRunner().invoke(main, [*command, "--steps", "1", "2", "1", "1"], catch_exceptions=False)
    assert third.output.count("drawing") == 3, "what came behind another second stage is worth nothing"
