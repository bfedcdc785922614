"""A run's validation questions as a task of lmms-eval, so that both judge the same model on the same questions.

::

    python -m infoprune_export.lmms.task runs/quickstart tasks
    python -m lmms_eval eval --model infoprune --model_args run=runs/quickstart --include_path tasks \\
        --tasks infoprune_validation --batch_size 16 --device cpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from infoprune_export.artifacts import staged
from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import read_recipe

TASK = "infoprune_validation"
QUESTIONS = "questions.jsonl"


def write_task(run: Path, folder: Path) -> Path:
    """Write ``folder/infoprune_validation``: the task's YAML, its functions, and one line of JSON per question.

    Images stay where they are. Returns the task's folder.

    Raises:
        InfopruneError: no run here, or its questions have no answers or are another benchmark's.
    """
    recipe = read_recipe(run / "recipe.json")
    split = dataset.read(recipe.data, run / "data")
    if not split.labelled or split.format != "vqav2":
        raise InfopruneError(
            f"{run}: its questions are not scored by VQAv2's accuracy; use lmms-eval's own task for another benchmark"
        )
    task = folder / TASK
    with staged(task) as staging:
        entries = (
            {
                "image": str(Path(str(sample.image)).resolve()),
                "question": question.text,
                "answers": list(question.answers),
                "kind": question.kind,
            }
            for sample in split.validation
            for question in sample.questions
        )
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (staging / QUESTIONS).write_text(lines, encoding="utf-8")
        source = Path(__file__).with_name("tasks") / TASK
        (staging / "utils.py").write_text((source / "utils.py").read_text(encoding="utf-8"), encoding="utf-8")
        place = {"dataset_kwargs": {"data_files": {"validation": str((task / QUESTIONS).resolve())}}}
        limit = {"generation_kwargs": {"max_new_tokens": split.max_new_tokens, "do_sample": False, "until": []}}
        text = (source / "task.yaml").read_text(encoding="utf-8") + yaml.safe_dump({**place, **limit})
        (staging / f"{TASK}.yaml").write_text(text, encoding="utf-8")
    return task


def main(arguments: list[str]) -> int:
    """RUN and FOLDER; prints where the task is. Exit code 2 for a mistake."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m infoprune_export.lmms.task RUN FOLDER\n")
        return 2
    try:
        sys.stdout.write(f"{write_task(Path(arguments[0]), Path(arguments[1]))}\n")
    except InfopruneError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
