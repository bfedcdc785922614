"""A stage that asks the model, made by several processes, each a fresh interpreter that runs `worker`.

Every process makes the whole stage in a folder of its own. Each answers its share of the batches and gets the others'
answers, so all of them come to the same result, and the first one's is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infoprune_export.pipeline import Run

MADE = "made-{}"


def shared_out(make: Callable[[Run, Path], None], name: str) -> Callable[[Run, Path], None]:
    """`make`, by as many processes as ``validate.processes`` says; `name` is the stage's."""

    def make_stage(run: Run, folder: Path) -> None:
        processes = run.recipe.validate_.processes
        if processes == 1:
            make(run, folder)
        else:
            _in_processes(run, name, folder, processes)

    return make_stage


def _in_processes(run: Run, name: str, folder: Path, processes: int) -> None:
    from infoprune_export.training.launch import launch

    scratch = folder / "processes"
    scratch.mkdir()
    advances: dict[str, Callable[[int], None]] = {}

    def show(line: dict[str, Any]) -> None:
        if line["title"] not in advances:
            advances[line["title"]] = run.track(line["title"], line["total"])
        advances[line["title"]](line["advance"])

    job = {
        "stage": name,
        "recipe": run.recipe.to_dict(),
        "folder": str(run.folder.resolve()),
        "finished": {stage: str(path.resolve()) for stage, path in run.finished.items()},
        "device": run.device,
        "scratch": str(scratch.resolve()),
    }
    try:
        launch(
            "infoprune_export.stages.worker",
            job,
            processes,
            run.device,
            scratch,
            what=f"stage {name}",
            advice="run with validate.processes = 1",
            on_line=show,
        )
        for path in (scratch / MADE.format(0)).iterdir():
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
