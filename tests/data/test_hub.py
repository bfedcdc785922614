"""Data sets in the form of lmms-lab's releases, from local parquet files: what is kept of them, and what is refused."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infoprune_export.data import dataset, hub
from infoprune_export.data.formats import FORMATS, format_of
from infoprune_export.data.samples import Question, Sample, open_image
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the extra hub (datasets) is not installed"
)


def png(shade: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 80, 160)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{shade}.png"}


def rows_of(name: str, n: int) -> list[dict[str, Any]]:
    """Rows about image `n`, with the columns of the release."""
    image, q = {"image": png(n)}, {"question": f"Is it {n}?"}
    ten = [{"answer": "dog", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    types = {"structural": "verify", "semantic": "attr", "detailed": "x"}
    choice = {"A": "dog", "B": "cat", "C": None, "D": None, "hint": None, "category": "shape"}
    return {
        "vqav2": [
            {**image, **q, "question_id": n * 10 + i, "image_id": n, "question_type": "is", "answers": ten}
            for i in (0, 1)
        ],
        "textvqa": [
            {**image, **q, "question_id": n, "image_id": f"i{n}", "answers": ["dog"] * 10, "ocr_tokens": ["STOP"]}
        ],
        "gqa": [{**q, "id": f"20{n}", "imageId": f"n{n}", "answer": "yes", "isBalanced": True, "types": types}],
        "pope": [
            {**image, **q, "id": str(n), "question_id": str(n), "answer": "yes", "category": c, "image_source": f"i{n}"}
            for c in ("random", "popular")
        ],
        "mme": [
            {**image, **q, "question_id": f"existence/{n}.png", "answer": a, "category": "existence"}
            for a in ("Yes", "No")
        ],
        "mmbench": [
            {**image, **q, **choice, "index": n, "answer": "A"},
            {**image, **q, **choice, "index": n + 1_000_000, "answer": "B", "A": "cat", "B": "dog"},
        ],
        "scienceqa": [{**image, **q, "choices": ["west", "east"], "answer": 1, "hint": "", "subject": "geography"}],
        "vizwiz": [{**image, **q, "question_id": f"v{n}.jpg", "answers": ["dog"] * 10, "category": "other"}],
    }[name.removesuffix("_cn")]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if "image" in table.column_names:
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(path)


def release(folder: Path, name: str, images: int = 6) -> DataSpec:
    source = format_of(name).hub
    config = (source.config or "").format(split=source.split)
    rows = [row for n in range(images) for row in rows_of(name, n)]
    write_parquet(folder / config / f"{source.split}-00000-of-00001.parquet", rows)
    if source.images:
        pictures = [{"id": f"n{n}", "image": png(n)} for n in range(images)]
        write_parquet(
            folder / source.images.format(split=source.split) / f"{source.split}-00000-of-00001.parquet", pictures
        )
    return DataSpec(format=name, hub=str(folder), calibration_images=2, validation_questions=3)


@needs_datasets
@pytest.mark.parametrize("name", FORMATS)
def test_a_release_gives_as_many_images_and_questions_as_are_needed(tmp_path, name):
    spec = release(tmp_path / "hub", name)
    dataset.check(spec)
    (tmp_path / "made").mkdir()
    fetched: list[int] = []
    dataset.make(tmp_path / "made", spec, 0, fetched.append)
    split = dataset.read(spec, tmp_path / "made")
    assert split.labelled
    assert len(split.calibration) == 2
    asked = [question for sample in split.validation for question in sample.questions]
    assert len(asked) == (2 if name in ("mme", "mmbench", "mmbench_cn") else 3)
    assert len(fetched) < 6 * len(rows_of(name, 0))
    samples = [*split.calibration, *split.validation]
    assert [open_image(sample.image).getpixel((0, 0))[0] for sample in samples] == list(range(len(samples)))
    known = format_of(name)
    assert known.instruction in asked[0].text
    assert known.score(asked, [question.answers[0] for question in asked]).tolist() == [1.0] * len(asked)
    assert dataset.own_files(spec)[0].suffix == ".parquet"


def test_rotations_far_down_a_split_are_found_for_items_that_were_begun(tmp_path):
    """MMBench's stand behind all plain rows: without them its circular accuracy would be that of single rows."""
    order = [f"{item}" for item in range(20)] + [f"{item + 1_000_000}" for item in range(20)]

    def pairs():
        for index in order:
            item = str(int(index) % 1_000_000)
            yield item, png(int(item))["bytes"], Question("?", ("A",), id=index, choices=("a", "b"), group=item)

    spec = DataSpec(format="mmbench", hub="h", calibration_images=2, validation_questions=3)
    entries = hub._enough(pairs(), spec, tmp_path, lambda rows: None, scattered=format_of("mmbench").hub.scattered)
    assert len(entries) == len(list((tmp_path / "images").iterdir())) == 5
    for item, entry in enumerate(entries):
        assert [question["id"] for question in entry["questions"]] == [f"{item}", f"{item + 1_000_000}"]


@pytest.mark.parametrize(("fetched", "calibrate"), [(12, 8), (9, 8), (8, 4), (3, 1)])
def test_of_what_was_fetched_as_many_calibrate_as_were_asked_for(tmp_path, monkeypatch, fetched, calibrate):
    samples = [Sample(tmp_path / f"{n}.png", (Question("?", ("A",)),)) for n in range(fetched)]
    monkeypatch.setattr(hub, "read_fetched", lambda folder: samples)
    split = dataset.read(DataSpec(format="gqa", hub="h", calibration_images=8), tmp_path)
    assert (len(split.calibration), len(split.validation)) == (calibrate, fetched - calibrate)


@needs_datasets
def test_textvqa_of_the_hub_has_ocr_tokens(tmp_path):
    spec = release(tmp_path / "hub", "textvqa").model_copy(update={"ocr_tokens": True})
    (tmp_path / "made").mkdir()
    dataset.make(tmp_path / "made", spec, 0)
    assert "\nReference OCR token: STOP\n" in dataset.read(spec, tmp_path / "made").validation[0].questions[0].text


@needs_datasets
def test_another_benchmark_than_the_format_says_is_named_with_its_row(tmp_path):
    spec = release(tmp_path / "hub", "vizwiz").model_copy(update={"format": "pope", "split": "val"})
    (tmp_path / "made").mkdir()
    with pytest.raises(InfopruneError, match=r"row 0 is not in the form of pope \(KeyError: 'id'\)") as caught:
        dataset.make(tmp_path / "made", spec, 0)
    assert "\n" not in str(caught.value)


@needs_datasets
def test_a_split_that_is_not_there_is_named(tmp_path):
    spec = release(tmp_path / "hub", "pope").model_copy(update={"split": "nowhere"})
    (tmp_path / "made").mkdir()
    with pytest.raises(InfopruneError, match=r"no \*nowhere\*\.parquet in this folder"):
        dataset.make(tmp_path / "made", spec, 0)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(InfopruneError, match=r'pip install "infoprune-export\[hub\]"') as caught:
        dataset.check(DataSpec(format="pope", hub="lmms-lab/POPE"))
    assert "\n" not in str(caught.value)
