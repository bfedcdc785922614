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
