import numpy as np
import torch

from infoprune_export.data import dataset, scenes, testbed
from infoprune_export.data.train_testbed import GRID, background_left_out, pack_questions, patch_labels
from infoprune_export.models.vlm import VisualTokens
from infoprune_export.recipe import DataSpec
from infoprune_export.validate.accuracy import collect_answers, estimate, vqa_scores


def test_shipped_model_answers_fresh_scenes(trained_vlm, tmp_path):
    """About 93% on 2,000 questions; 700 leave a standard error of one point."""
    spec = DataSpec(calibration_images=1, validation_questions=700)
    dataset.draw_scenes(tmp_path, spec, seed=20_000)
    samples = dataset.read(spec, tmp_path).validation

    def encode(inputs):
        return VisualTokens(trained_vlm.tower.features(inputs))

    assert estimate(samples, vqa_scores(samples, collect_answers(trained_vlm, samples, encode))).percent > 90


def test_every_question_and_answer_is_in_the_vocabulary():
    tokenizer = testbed.build_processor().tokenizer
    for index in range(60):
        scene, _ = scenes.scene_at(3, index)
        for question in scenes.ask(scene, np.random.default_rng(index), 7):
            for text in (question.text, question.answer):
                assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text
            assert tokenizer.decode(tokenizer(question.answer).input_ids) == question.answer


def test_patch_labels_point_at_the_objects():
    for index in range(40):
        scene, _ = scenes.scene_at(4, index)
        labels = patch_labels(scene)
        for item in scene.items:
            patch = int(item.y // 14) * GRID + int(item.x // 14)
            assert labels[patch, 0] == scenes.SHAPES.index(item.shape)
            assert labels[patch, 1] == list(scenes.COLORS).index(item.color)


def test_only_background_is_ever_left_out():
    rng = np.random.default_rng(0)
    batch = [scenes.scene_at(5, index)[0] for index in range(6)]
    counts = set()
    for _ in range(20):
        kept = background_left_out(batch, rng).numpy()
        counts.add(kept.shape[1])
        for scene, tokens in zip(batch, kept, strict=True):
            dropped = np.setdiff1d(np.arange(GRID * GRID), tokens)
            assert (patch_labels(scene)[dropped, :5] == [6, 7, 12, 10, 10]).all()
            assert (np.diff(tokens) > 0).all()
    assert len(counts) > 5


def test_packed_questions_do_not_see_each_other():
    processor = testbed.build_processor()
    asked = [[("What color is the circle?", "red", 1.0), ("How many objects are there?", "4", 1.0)]]
    ids, labels, weights, mask, positions = pack_questions(processor, asked, visual_tokens=3)
    second = int((ids[0] == processor.tokenizer.convert_tokens_to_ids("<user>")).nonzero()[1])
    visible = mask[0, 0] == 0
    assert visible[second:, :4].all(), "every question sees the image"
    assert not visible[second:, 4:second].any(), "and not the question before it"
    assert not torch.triu(visible, 1).any(), "nor the future"
    assert positions[0, second] == positions[0, 4] == 4
    answered = labels[0] != -100
    assert processor.tokenizer.decode(labels[0][answered]).split() == ["red", "</s>", "4", "</s>"]
    assert (weights[0][answered] == 1).all()
