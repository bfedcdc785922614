import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec


def photographs(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(folder / f"photo{i:02d}.jpg")
    return str(folder)


def test_scenes_are_drawn_and_split_by_image(tmp_path):
    spec = DataSpec(calibration_images=5, validation_questions=20)
    dataset.draw_scenes(tmp_path, spec, seed=1)
    split = dataset.read(spec, tmp_path)
    assert split.labelled
    assert len(split.calibration) == 5
    assert sum(len(sample.questions) for sample in split.validation) == 20
    assert not {s.image for s in split.calibration} & {s.image for s in split.validation}
    assert all(len(question.answers) == 10 for sample in split.calibration for question in sample.questions)


def test_the_same_seed_draws_the_same_bytes(tmp_path):
    spec = DataSpec(calibration_images=2, validation_questions=3)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        dataset.draw_scenes(tmp_path / name, spec, seed)
    contents = [
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()} for n in "abc"
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


@pytest.mark.parametrize("sizes", ["square", "mixed"])
def test_scenes_are_of_the_sizes_the_recipe_asks_for(tmp_path, sizes):
    dataset.draw_scenes(tmp_path, DataSpec(calibration_images=8, validation_questions=1, scene_sizes=sizes), seed=1)
    drawn = {Image.open(path).size for path in (tmp_path / "images").iterdir()}
    assert drawn == {(112, 112)} if sizes == "square" else len(drawn) > 2


def test_unknown_scene_sizes_are_refused():
    with pytest.raises(ValidationError, match="scene_sizes"):
        DataSpec(scene_sizes="large")


def test_a_folder_of_photographs_is_split_in_half_when_it_is_small(tmp_path):
    spec = DataSpec(images=photographs(tmp_path / "p", 7), prompts=("What is this?", "Where is it?"))
    split = dataset.read(spec)
    assert not split.labelled
    assert (len(split.calibration), len(split.validation)) == (3, 4)
    assert [q.text for q in split.validation[0].questions] == ["What is this?", "Where is it?"]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(tmp_path, count):
    with pytest.raises(InfopruneError, match=f"{count} images: at least 2"):
        dataset.check(DataSpec(images=photographs(tmp_path / "p", count)))


def test_missing_files_are_refused(tmp_path):
    folder = photographs(tmp_path / "p", 3)
    with pytest.raises(InfopruneError, match="no image folder"):
        dataset.check(DataSpec(images=str(tmp_path / "nowhere")))
    with pytest.raises(InfopruneError, match=r"data\.questions"):
        dataset.check(DataSpec(images=folder, questions="q.json", annotations="a.json"))


# ── Calibration from elsewhere ───────────────────────────────────────────────


def test_calibration_from_elsewhere_leaves_all_scenes_that_validate(tmp_path):
    spec = DataSpec(calibration_images=3, validation_questions=20)
    (tmp_path / "drawn").mkdir()
    dataset.make(tmp_path / "drawn", spec, 1)
    other = spec.model_copy(update={"calibration_from": photographs(tmp_path / "p", 5)})
    split, plain = dataset.read(other, tmp_path / "drawn"), dataset.read(spec, tmp_path / "drawn")
    assert split.validation == plain.validation
    assert split.labelled
    assert not split.calibration_labelled
    assert plain.calibration_labelled
    assert [sample.image.name for sample in split.calibration] == ["photo00.jpg", "photo01.jpg", "photo02.jpg"]
    assert dataset.own_files(other) == [sample.image for sample in split.calibration]
    assert dataset.own_files(spec) == []


def test_images_that_calibrate_must_not_validate(tmp_path):
    folder = photographs(tmp_path / "p", 4)
    with pytest.raises(InfopruneError, match=r"photo00\.jpg validates too; name a folder of other images"):
        dataset.check(DataSpec(images=folder, calibration_from=folder))
    (tmp_path / "none").mkdir()
    with pytest.raises(InfopruneError, match=r"calibration_from = .*: no image in it"):
        dataset.check(DataSpec(images=folder, calibration_from=str(tmp_path / "none")))


@pytest.mark.parametrize("style", ["plain", "grayscale", "noise"])
def test_a_style_changes_calibration_scenes_and_nothing_else(tmp_path, style):
    spec = DataSpec(calibration_images=2, validation_questions=3)
    for name, chosen in (("same", "same"), ("styled", style)):
        (tmp_path / name).mkdir()
        dataset.make(tmp_path / name, spec.model_copy(update={"calibration_style": chosen}), 1)
    same, styled = (dataset.read(spec, tmp_path / name) for name in ("same", "styled"))
    for kept, changed in zip(same.calibration, styled.calibration, strict=True):
        assert kept.questions == changed.questions
        before, after = (np.asarray(Image.open(s.image), float) for s in (kept, changed))
        assert before.shape == after.shape
        assert np.abs(before - after).mean() > 2
        channels = np.ptp(after, axis=2)
        assert (channels.max() == 0) == (style == "grayscale")
        rough = [np.abs(np.diff(image, axis=1)).mean() for image in (before, after)]
        assert style == "grayscale" or (rough[1] > rough[0]) == (style == "noise")
    for kept, changed in zip(same.validation, styled.validation, strict=True):
        assert kept.image.read_bytes() == changed.image.read_bytes()


# ── What belongs together ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"format": "vqav2", "images": "i"}, r"needs questions \(the question file\) and annotations"),
        ({"format": "gqa", "questions": "q"}, r"needs images \(the folder of images\), or hub"),
        ({"format": "gqa", "images": "i", "questions": "q", "annotations": "a"}, "has no annotations: leave it out"),
        ({"format": "mmbench", "images": "i", "questions": "q"}, "has no images: leave it out"),
        ({"format": "textvqa", "images": "i", "questions": "q", "ocr_tokens": True}, "Rosetta"),
        ({"format": "textvqa", "images": "i", "questions": "q", "annotations": "a"}, "has no annotations"),
        ({"format": "pope", "hub": "lmms-lab/POPE", "images": "i"}, "hub brings images and questions: leave images"),
        ({"hub": "lmms-lab/POPE"}, "hub needs format"),
        ({"format": "mme", "images": "i", "split": "test"}, "split = 'test' belongs to hub"),
        ({"revision": "main"}, "revision = 'main' belongs to hub"),
        ({"format": "mme", "images": "i", "ocr_tokens": True}, "ocr_tokens belongs to format textvqa"),
        ({"images": "i", "calibration_style": "plain"}, "is about drawn scenes"),
        ({"calibration_from": "f", "calibration_style": "plain"}, "exclude each other"),
        ({"images": "i", "instruction": "Briefly."}, "write prompts in full instead"),
        ({"format": "coco", "images": "i"}, "format"),
        ({"workers": -1}, "workers"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings, fix):
    with pytest.raises(ValidationError, match=fix):
        DataSpec(**settings)


def test_scenes_and_bare_images_are_asked_as_before(tmp_path):
    scenes, bare = DataSpec(), DataSpec(images=photographs(tmp_path / "p", 2))
    assert (scenes.benchmark, scenes.drawn, scenes.made) == ("vqav2", True, True)
    assert (bare.benchmark, bare.drawn, bare.made) == (None, False, False)
    assert dataset.read(bare).max_new_tokens == 8
    assert dataset.read(bare.model_copy(update={"max_new_tokens": 3})).max_new_tokens == 3
    assert "workers" not in scenes.to_slice()
