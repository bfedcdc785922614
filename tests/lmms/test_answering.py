"""The same answers as from the model itself, and a run's questions as a task's documents."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
import yaml
from finished import finished

from infoprune_export.data import dataset
from infoprune_export.data.metrics.vqa import vqa_accuracy
from infoprune_export.data.samples import open_image
from infoprune_export.errors import InfopruneError
from infoprune_export.lmms import task
from infoprune_export.lmms.answering import open_answering
from infoprune_export.recipe import read_recipe
from infoprune_export.runtime import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory)


@pytest.fixture(scope="module")
def samples(run):
    return dataset.read(read_recipe(run / "recipe.json").data, run / "data").validation[:2]


def asked(samples):
    images = [[open_image(sample.image)] for sample in samples for _ in sample.questions[:2]]
    return images, [question.text for sample in samples for question in sample.questions[:2]]


def test_a_run_answers_with_its_engine_and_stage_2(run, samples):
    images, questions = asked(samples)
    answering, expected = open_answering(str(run), None, "cpu"), open_run(run, "cpu")
    assert answering.decoder is not None
    assert answering.answers(images, questions, 8) == expected.answer_all(images, questions, 8)


def test_a_model_answers_in_pytorch_as_validation_recorded(run, samples):
    """The original, and the same questions that the baseline stage asked it."""
    original = open_answering(None, read_recipe(run / "recipe.json").model.name_or_path, "cpu")
    images, questions = asked(samples)
    known = json.loads((run / "baseline" / "answers.json").read_text())
    assert original.answers(images, questions, 8) == [text for row in known[:2] for text in row[:2]]


def test_the_loss_of_a_reply_is_that_of_its_tokens(run, samples):
    """Teacher-forced step by step, through the model's own forward on what the encoder sees."""
    checkpoint = open_answering(None, str(run / "checkpoint"), "cpu")
    (image,), question = asked(samples)[0][0], samples[0].questions[0].text
    greedy = checkpoint.answers([[image]], [question], 8)[0]
    best = checkpoint.loss(image, question, greedy)
    others = [checkpoint.loss(image, question, reply) for reply in ("red", "circle", "left", "3") if reply != greedy]
    assert 0 <= best < min(others)
    assert all(math.isfinite(loss) for loss in others)


def test_a_run_or_a_model_and_not_both(run):
    for arguments in ((None, None), (str(run), "testbed/tiny-llava")):
        with pytest.raises(InfopruneError, match="one of the two"):
            open_answering(*arguments, "cpu")


# ── The task ──


def test_a_runs_questions_become_documents_that_score_as_validation_does(run, tmp_path):
    folder = task.write_task(run, tmp_path)
    split = dataset.read(read_recipe(run / "recipe.json").data, run / "data")
    documents = [json.loads(line) for line in (folder / task.QUESTIONS).read_text().splitlines()]
    assert [doc["question"] for doc in documents] == [q.text for s in split.validation for q in s.questions]
    spec = importlib.util.spec_from_file_location("task_utils", folder / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    assert torch.equal(
        *(
            torch.tensor(list(image.getdata()))
            for image in (utils.doc_to_visual(documents[0])[0], open_image(split.validation[0].image))
        )
    )
    assert utils.doc_to_text(documents[0]) == documents[0]["question"]
    answers = documents[0]["answers"]
    for text in (answers[0], "nothing of it"):
        assert utils.process_results(documents[0], [text]) == {"vqa_accuracy": vqa_accuracy(text, answers)}


def test_the_yaml_names_the_file_and_the_length_of_answers(run, tmp_path):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    folder = task.write_task(run, tmp_path)
    config = yaml.load((folder / f"{task.TASK}.yaml").read_text(), Loader)  # noqa: S506  (a SafeLoader)
    assert config["dataset_kwargs"]["data_files"] == {"validation": str(folder / task.QUESTIONS)}
    assert config["generation_kwargs"]["max_new_tokens"] == 8
    names = {config[key].removeprefix("utils.") for key in ("doc_to_visual", "doc_to_text", "process_results")}
    source = (folder / "utils.py").read_text()
    assert all(f"def {name}(" in source for name in names)


def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path, capsys):
    assert task.main([str(tmp_path / "none"), str(tmp_path / "tasks")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "tasks").exists()
    assert task.main([]) == 2
