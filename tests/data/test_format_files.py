"""Small files in the benchmarks' released formats: what is read, word for word, and every fault in one line."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infoprune_export.data import dataset
from infoprune_export.data.formats import FORMATS, format_of
from infoprune_export.data.samples import EmbeddedImage, Sample, open_image
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (shade, 80, 160)).save(path)
    return path


def dump(path: Path, tree: Any) -> str:
    path.write_text(json.dumps(tree), encoding="utf-8")
    return str(path)


def refused(spec: DataSpec, *mentions: str) -> None:
    with pytest.raises(InfopruneError) as caught:
        format_of(spec.benchmark or "").read(spec)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for mention in mentions:
        assert mention in message


# ── The files ────────────────────────────────────────────────────────────────


def vqav2(folder: Path) -> DataSpec:
    for number in (1, 2):
        picture(folder / "i" / f"COCO_val2014_{number:012d}.png", number)
    questions = [{"question_id": n * 10, "image_id": n, "question": f"What is {n}?"} for n in (1, 2)]
    answers = [
        {"question_id": n * 10, "image_id": n, "question_type": "what is", "answers": ten("dog")} for n in (1, 2)
    ]
    return DataSpec(
        format="vqav2",
        images=str(folder / "i"),
        questions=dump(folder / "q.json", {"questions": questions}),
        annotations=dump(folder / "a.json", {"annotations": answers}),
    )


def ten(text: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]


def textvqa(folder: Path) -> DataSpec:
    rows = []
    for n, name in enumerate(("003a8ae2ef43b901", "0054c91397f2fe05")):
        picture(folder / "i" / f"{name}.jpg", n)
        rows.append({"question_id": 34602 + n, "image_id": name, "question": "what brand?", "answers": ["Dakota"] * 10})
    rows.append({**rows[0], "question_id": 34610, "question": "what time?"})
    tree = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": rows}
    return DataSpec(format="textvqa", images=str(folder / "i"), questions=dump(folder / "val.json", tree))


def gqa(folder: Path) -> DataSpec:
    tree = {}
    for n, (name, kind) in enumerate((("n161313", "query"), ("n235859", "verify"))):
        picture(folder / "i" / f"{name}.jpg", n)
        types = {"structural": kind, "semantic": "attr", "detailed": "x"}
        entry = {"imageId": name, "question": "Is it?", "answer": "yes", "isBalanced": True, "types": types}
        tree[f"20{n}"] = {**entry, "fullAnswer": "Yes.", "groups": {"global": None, "local": "1"}}
    return DataSpec(format="gqa", images=str(folder / "i"), questions=dump(folder / "testdev.json", tree))


def pope(folder: Path) -> DataSpec:
    (folder / "coco").mkdir(parents=True)
    for category in ("random", "popular", "adversarial"):
        lines = []
        for n in range(4):
            name = f"COCO_val2014_{n // 2:012d}.jpg"
            picture(folder / "i" / name, n // 2)
            label = "yes" if n % 2 == 0 else "no"
            lines.append({"question_id": n + 1, "image": name, "text": f"Is there a {category}?", "label": label})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "coco" / f"coco_pope_{category}.json").write_text(text)
    return DataSpec(format="pope", images=str(folder / "i"), questions=str(folder / "coco"))


def mme(folder: Path) -> DataSpec:
    root = folder / "MME_Benchmark_release"
    picture(root / "existence" / "0001.jpg", 1).with_suffix(".txt").write_text(
        "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    )
    picture(root / "artwork" / "images" / "10002.jpg", 2)
    (root / "artwork" / "questions_answers_YN").mkdir()
    (root / "artwork" / "questions_answers_YN" / "10002.txt").write_text(
        "Does it show X? Please answer yes or no.\tYes\nDoes it show Y? Please answer yes or no.\tNo\n"
    )
    return DataSpec(format="mme", images=str(root))


def encoded(shade: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 80, 160)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


MMBENCH_COLUMNS = (
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "l2-category",
    "split",
)


def mmbench_rows() -> list[list[str]]:
    rest = ["attribute", "dev"]
    hint = 'Two\nlines, a "quote"\tand a tab'
    return [
        ["241", "What is it?", hint, "dog", "cat", "", "", "A", "shape", encoded(1), *rest],
        ["1000241", "What is it?", hint, "cat", "dog", "", "", "B", "shape", "241", *rest],
        ["252", "Farbe, größer?", "", "red", "blue", "green", "red car", "C", "color", encoded(2), *rest],
        ["253", "And?", "", "x", "y", "", "", "B", "color", "252", *rest],
    ]


def write_tsv(path: Path, rows: list[list[str]], columns: tuple[str, ...] = MMBENCH_COLUMNS) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([list(columns), *rows])
    return str(path)


def mmbench(folder: Path, name: str = "mmbench") -> DataSpec:
    return DataSpec(format=name, questions=write_tsv(folder / "dev.tsv", mmbench_rows()))


def scienceqa(folder: Path) -> DataSpec:
    problem = {"question": "Which?", "choices": ["west", "east"], "answer": 1, "hint": "", "image": "image.png"}
    problem |= {"subject": "geography", "task": "closed choice", "grade": "grade2"}
    tree = {"4": problem, "7": {**problem, "hint": "A map.", "answer": 0}, "9": {**problem, "image": None}}
    for pid in ("4", "7"):
        picture(folder / "images" / "test" / pid / "image.png", int(pid))
    return DataSpec(
        format="scienceqa",
        images=str(folder / "images"),
        questions=dump(folder / "problems.json", tree),
        annotations=dump(folder / "pid_splits.json", {"train": [], "test": ["4", "9", "7"]}),
    )


def vizwiz(folder: Path) -> DataSpec:
    rows = []
    for n in (0, 1):
        name = f"VizWiz_val_{n:08d}.jpg"
        picture(folder / "i" / name, n)
        row = {"image": name, "question": "Can you read it?", "answers": ten("unanswerable"), "answerable": 0}
        rows.append({**row, "answer_type": "unanswerable"})
    return DataSpec(format="vizwiz", images=str(folder / "i"), questions=dump(folder / "val.json", rows))


WRITERS = {
    "vqav2": vqav2,
    "textvqa": textvqa,
    "gqa": gqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "mmbench_cn": lambda folder: mmbench(folder, "mmbench_cn"),
    "scienceqa": scienceqa,
    "vizwiz": vizwiz,
}


def read(spec: DataSpec) -> list[Sample]:
    return format_of(spec.benchmark or "").read(spec)


# ── All of them ──────────────────────────────────────────────────────────────


def test_every_format_of_a_recipe_is_registered_and_has_a_file_here():
    names = DataSpec.model_fields["format"].annotation.__args__[0].__args__
    assert set(names) == set(FORMATS) == set(WRITERS)
    with pytest.raises(InfopruneError, match=r"data\.format = 'coco': no such format; there are vqav2"):
        format_of("coco")


@pytest.mark.parametrize("name", WRITERS)
def test_a_split_has_questions_with_answers_ids_and_images_that_open(tmp_path, name):
    spec = WRITERS[name](tmp_path)
    dataset.check(spec)
    split = dataset.read(spec)
    assert split.labelled
    assert split.calibration_labelled
    assert (split.format, split.max_new_tokens) == (name, 16)
    samples = split.calibration + split.validation
    assert len(samples) == 2
    questions = [question for sample in samples for question in sample.questions]
    assert all(question.answers and question.id for question in questions)
    assert len({question.id for question in questions}) == len(questions)
    assert [open_image(sample.image).size for sample in samples] == [(20, 16)] * 2
    assert {path for path in dataset.own_files(spec) if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_right_answers_score_one_and_an_instruction_of_ones_own_replaces_the_official(tmp_path, name):
    spec = WRITERS[name](tmp_path)
    samples = read(spec.model_copy(update={"instruction": "Briefly."}))
    questions = [question for sample in samples for question in sample.questions]
    assert all(question.text.endswith("\nBriefly.") for question in questions)
    known = format_of(name)
    assert known.instruction not in "".join(question.text for question in questions)
    assert known.score(questions, [question.answers[0] for question in questions]).tolist() == [1.0] * len(questions)


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.startswith(("mmbench", "mme"))])
def test_a_missing_image_is_named(tmp_path, name):
    spec = WRITERS[name](tmp_path)
    shutil.rmtree(spec.images)
    Path(spec.images).mkdir()
    refused(spec, "image", str(spec.images))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "mme"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[1]", b"null", b'{"data": [1]}'])
def test_a_file_of_something_else_is_named(tmp_path, name, content):
    spec = WRITERS[name](tmp_path)
    path = Path(spec.questions)
    file = path / "coco_pope_random.json" if path.is_dir() else path
    file.write_bytes(content)
    refused(spec, str(file))


# ── One by one ───────────────────────────────────────────────────────────────


def test_vqav2_that_is_not_named_is_asked_as_it_stands(tmp_path):
    spec = vqav2(tmp_path)
    assert [s.questions[0].text for s in read(spec)] == [f"What is 1?{SHORT}", f"What is 2?{SHORT}"]
    bare = spec.model_copy(update={"format": None})
    assert [s.questions[0].text for s in read(bare)] == ["What is 1?", "What is 2?"]
    assert dataset.read(bare).max_new_tokens == 8


def test_an_image_that_is_there_twice_is_refused(tmp_path):
    spec = vqav2(tmp_path / "vqa")
    (one, *_) = sorted(Path(spec.images).iterdir())
    (Path(spec.images) / "thumbnails").mkdir()
    shutil.copy(one, Path(spec.images) / "thumbnails" / one.name)
    refused(spec, f"{one.name} and thumbnails/{one.name} are both image", "keep one of the two")
    spec = mme(tmp_path / "mme")
    one = next(path for path in Path(spec.images).rglob("*") if path.suffix in (".png", ".jpg"))
    shutil.copy(one, one.with_suffix(".webp"))
    refused(spec, "are both image", "keep one of the two")


def test_the_questions_of_mme_are_among_the_users_files(tmp_path):
    """A corrected answer must make the run's stages again."""
    files = dataset.own_files(mme(tmp_path))
    texts = set(tmp_path.rglob("*.txt"))
    assert texts
    assert texts <= set(files)


def test_textvqa_groups_questions_by_image(tmp_path):
    samples = read(textvqa(tmp_path))
    assert [[q.id for q in sample.questions] for sample in samples] == [["34602", "34610"], ["34603"]]
    assert samples[0].questions[0].text == f"what brand?{SHORT}"
    assert samples[0].questions[0].answers == ("Dakota",) * 10


def test_textvqa_gives_ocr_tokens_where_asked_to(tmp_path):
    spec = textvqa(tmp_path)
    names = ("003a8ae2ef43b901", "0054c91397f2fe05")
    tokens = {"data": [{"image_id": name, "ocr_tokens": ["DAKOTA", "7,5"], "ocr_info": []} for name in names]}
    ocr = dump(tmp_path / "ocr.json", tokens)
    with_tokens = spec.model_copy(update={"ocr_tokens": True, "annotations": ocr})
    assert read(with_tokens)[0].questions[0].text == f"what brand?\nReference OCR token: DAKOTA, 7,5{SHORT}"
    dump(tmp_path / "ocr.json", {"data": tokens["data"][:1]})
    refused(with_tokens, "ocr.json", "no OCR tokens for image 0054c91397f2fe05")


def test_a_duplicate_id_is_named(tmp_path):
    spec = textvqa(tmp_path)
    tree = json.loads(Path(spec.questions).read_text())
    tree["data"].append(tree["data"][0])
    dump(Path(spec.questions), tree)
    refused(spec, "id 34602 is there twice")


def test_an_image_name_that_leaves_the_folder_is_refused(tmp_path):
    spec = vizwiz(tmp_path)
    picture(tmp_path / "secret.jpg")
    tree = json.loads(Path(spec.questions).read_text())
    tree[0]["image"] = "../secret.jpg"
    dump(Path(spec.questions), tree)
    refused(spec, "entry 0", "'../secret.jpg' is outside of")


def test_gqa_leaves_unbalanced_questions_out(tmp_path):
    spec = gqa(tmp_path)
    tree = json.loads(Path(spec.questions).read_text())
    tree["201"]["isBalanced"] = False
    dump(Path(spec.questions), tree)
    (sample,) = read(spec)
    assert (sample.questions[0].id, sample.questions[0].kind) == ("200", "query")
    tree["200"]["types"] = {}
    dump(Path(spec.questions), tree)
    refused(spec, "question 200: types has no 'structural'")


def test_pope_reads_three_categories_of_an_image(tmp_path):
    spec = pope(tmp_path)
    samples = read(spec)
    kinds = ["adversarial", "adversarial", "popular", "popular", "random", "random"]
    assert [[q.kind for q in sample.questions] for sample in samples] == [kinds, kinds]
    assert samples[0].questions[0].text == f"Is there a adversarial?{SHORT}"
    assert [q.answers for q in samples[0].questions[:2]] == [("yes",), ("no",)]
    one = spec.model_copy(update={"questions": str(tmp_path / "coco" / "coco_pope_popular.json")})
    assert {q.kind for sample in read(one) for q in sample.questions} == {"popular"}


def test_pope_with_a_wrong_label_is_named_with_its_line(tmp_path):
    spec = pope(tmp_path)
    path = tmp_path / "coco" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace('"no"', '"maybe"', 1))
    refused(spec, f"{path}: line 2", "'maybe'")
    path.write_text(path.read_text() + "{broken\n")
    path.write_text(path.read_text().replace('"maybe"', '"no"', 1))
    refused(spec, f"{path}: line 5 is not valid JSON")


def test_mme_in_both_layouts(tmp_path):
    spec = mme(tmp_path)
    existence, artwork = read(spec)
    assert existence.image.name == "0001.jpg"
    assert [q.text for q in existence.questions] == [f"Is there a dog?{SHORT}", f"Is there a cat?{SHORT}"]
    assert [q.answers for q in existence.questions] == [("Yes",), ("No",)]
    assert {q.group for q in artwork.questions} == {"artwork/10002.jpg"}
    assert {q.kind for q in artwork.questions} == {"artwork"}
    as_it_stands = read(spec.model_copy(update={"instruction": ""}))
    assert as_it_stands[0].questions[0].text == "Is there a dog? Please answer yes or no."


def test_mme_never_asks_half_an_image(tmp_path):
    spec = mme(tmp_path)
    assert len(dataset.read(spec.model_copy(update={"validation_questions": 3})).validation[0].questions) == 2
    with pytest.raises(InfopruneError, match=r"data\.validation_questions = 1 is less than the questions of item"):
        dataset.read(spec.model_copy(update={"validation_questions": 1}))


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("Is it? Yes\n", "line 1 has no tab"),
        ("Is it?\tPerhaps\n", "line 1: the answer is 'Perhaps'"),
        ("\n", "empty"),
    ],
)
def test_mme_with_a_wrong_line_is_named(tmp_path, text, mention):
    spec = mme(tmp_path)
    (Path(spec.images) / "existence" / "0001.txt").write_text(text)
    refused(spec, "0001.txt", mention)


def test_mme_without_an_image_or_a_subtask_is_named(tmp_path):
    spec = mme(tmp_path)
    (Path(spec.images) / "existence" / "0001.jpg").unlink()
    refused(spec, "no image 0001")
    shutil.rmtree(Path(spec.images) / "existence")
    shutil.rmtree(Path(spec.images) / "artwork")
    refused(spec, "no folder of an MME subtask")


def test_mmbench_images_stay_in_the_file(tmp_path):
    first, second = read(mmbench(tmp_path))
    assert isinstance(first.image, EmbeddedImage)
    assert first.image.name == "index-241"
    assert open_image(first.image).getpixel((0, 0)) == (1, 80, 160)
    assert open_image(second.image).getpixel((0, 0)) == (2, 80, 160)
    hint = 'Two\nlines, a "quote"\tand a tab\n'
    assert first.questions[0].text == f"{hint}What is it?\nA. dog\nB. cat{LETTER}"
    assert [q.group for q in first.questions] == ["241", "241"]
    assert [q.answers for q in first.questions] == [("A",), ("B",)]
    assert second.questions[0].text == f"Farbe, größer?\nA. red\nB. blue\nC. green\nD. red car{LETTER}"
    assert [(q.id, q.group, q.choices) for q in second.questions[1:]] == [("253", "253", ("x", "y"))]


def test_mmbench_in_chinese_asks_in_chinese(tmp_path):
    assert read(mmbench(tmp_path, "mmbench_cn"))[0].questions[0].text.endswith("B. cat\n请直接回答选项字母。")


@pytest.mark.parametrize(
    ("row", "column", "value", "mention"),
    [
        (0, 7, "C", "row 1: answer is 'C', not one of 'AB'"),
        (0, 7, "AB", "row 1: answer is 'AB'"),
        (2, 0, "241", "row 3: index 241 is there twice"),
        (1, 0, "x", "row 2: index is 'x'"),
        (1, 9, "999", "row 2: its image is that of index 999"),
        (1, 9, "", "row 2: image: index is ''"),
    ],
)
def test_mmbench_with_a_wrong_cell_is_named(tmp_path, row, column, value, mention):
    rows = mmbench_rows()
    rows[row][column] = value
    refused(DataSpec(format="mmbench", questions=write_tsv(tmp_path / "dev.tsv", rows)), "dev.tsv", mention)


def test_mmbench_without_a_column_or_with_a_torn_row_is_named(tmp_path):
    spec = mmbench(tmp_path)
    columns = tuple(name.replace("category", "kind") for name in MMBENCH_COLUMNS)
    write_tsv(tmp_path / "dev.tsv", mmbench_rows(), columns)
    refused(spec, "no column 'category'")
    write_tsv(tmp_path / "dev.tsv", mmbench_rows())
    content = (tmp_path / "dev.tsv").read_bytes()
    (tmp_path / "dev.tsv").write_bytes(content[: content.index(b"252")] + b"252\tonly\n")
    refused(spec, "row 3 has 2 cells, the header has 12")
    (tmp_path / "dev.tsv").write_bytes(content + b'1\t"never closed\n')
    refused(spec, "never closed")
    (tmp_path / "dev.tsv").write_bytes(content.replace("größer".encode(), b"gr\xf6\xdfer"))
    refused(spec, "row 3: cell 2 is not UTF-8")


def test_mmbench_with_a_damaged_image_is_named_when_it_opens(tmp_path):
    rows = mmbench_rows()
    rows[2][9] = "%" * 40
    spec = DataSpec(format="mmbench", questions=write_tsv(tmp_path / "dev.tsv", rows))
    with pytest.raises(InfopruneError, match=r"dev\.tsv: index-252: the image is not base64"):
        open_image(read(spec)[1].image)


def test_scienceqa_reads_problems_with_images_of_its_split(tmp_path):
    first, second = read(scienceqa(tmp_path))
    assert first.questions[0].text == f"Which?\nA. west\nB. east{LETTER}"
    assert second.questions[0].text == f"Context: A map.\nWhich?\nA. west\nB. east{LETTER}"
    assert [s.questions[0].answers for s in (first, second)] == [("B",), ("A",)]
    assert first.image == tmp_path / "images" / "test" / "4" / "image.png"


def test_scienceqa_faults_are_named(tmp_path):
    spec = scienceqa(tmp_path)
    refused(spec.model_copy(update={"split": "minival"}), "no split 'minival', there is train, test")
    refused(spec.model_copy(update={"split": "train"}), "no problem of split 'train' has an image")
    tree = json.loads(Path(spec.questions).read_text())
    tree["4"]["answer"] = 2
    dump(Path(spec.questions), tree)
    refused(spec, "problem 4: answer 2 of 2 choices")
    del tree["4"]
    dump(Path(spec.questions), tree)
    refused(spec, "problem 4 is missing, which pid_splits.json puts into test")


def test_vizwiz_tells_the_model_when_to_refuse(tmp_path):
    spec = vizwiz(tmp_path)
    question = read(spec)[0].questions[0]
    start = "Can you read it?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert question.text == start + SHORT
    known = format_of("vizwiz")
    assert known.figures([question], ["Unanswerable."], known.score([question], ["Unanswerable."])) == {
        "accuracy": 100,
        "said_unanswerable": 100,
        "type/unanswerable": 100,
    }
