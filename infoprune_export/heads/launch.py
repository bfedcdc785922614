"""Training the gates in several processes on this machine, each a fresh interpreter that runs `worker`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from infoprune_export.heads.train import Progress, Trained
from infoprune_export.training.launch import launch

RESULT = "trained.safetensors"


def train_in_processes(
    recipe: Mapping[str, Any],
    data: Path,
    device: str,
    processes: int,
    scratch: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Have `processes` workers train the gates of a recipe, and wait for them.

    Args:
        recipe: as `Recipe.to_dict` gives it.
        data: folder of the data stage.
        device: ``cpu``, or ``cuda`` for one GPU per process.
        processes: how many.
        scratch: where training state is kept, and everything else that the workers write until they are done.
        on_step: called for every finished step.

    Raises:
        InfopruneError: a worker ended before its time; with what it last said.
    """
    job = {"recipe": recipe, "data": str(data.resolve()), "device": device, "scratch": str(scratch.resolve())}
    (scratch / RESULT).unlink(missing_ok=True)
    try:
        launch(
            "infoprune_export.heads.worker",
            job,
            processes,
            device,
            scratch,
            what="gate training",
            advice="train with heads.processes = 1",
            on_line=lambda line: on_step(Progress(**line)),
        )
        return _read(scratch / RESULT)
    finally:
        (scratch / RESULT).unlink(missing_ok=True)


def _read(path: Path) -> Trained:
    with safe_open(path, "pt") as file:
        history = json.loads(file.metadata()["history"])
        return Trained(file.get_tensor("scores"), file.get_tensor("gates"), history)
