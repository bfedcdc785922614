"""One of the processes that `launch` starts: ``python -m infoprune_export.heads.worker JOB.json``."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from infoprune_export.console import quiet_libraries
from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.heads.launch import RESULT
from infoprune_export.heads.train import Progress, start_accelerator, train_gates
from infoprune_export.models.vlm import writable_copy
from infoprune_export.pipeline import load_vlm
from infoprune_export.recipe import Recipe
from infoprune_export.training.launch import tell


def work(job_file: Path) -> None:
    """Load model and data, train with the other processes, and let the first one write progress and result."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    recipe, scratch = Recipe.model_validate(job["recipe"]), Path(job["scratch"])
    parent = os.getppid()
    accelerator = start_accelerator(recipe.heads, job["device"])
    original = load_vlm(recipe.model, str(accelerator.device))
    split = dataset.read(recipe.data, Path(job["data"]))

    def show(progress: Progress) -> None:
        if os.getppid() != parent:
            raise InfopruneError("the process that started this training is gone")
        tell(scratch, asdict(progress))

    trained = train_gates(
        writable_copy(original),
        original.tower,
        split.calibration,
        recipe.heads,
        labelled=split.calibration_labelled,
        seed=recipe.seed,
        scratch=scratch,
        on_step=show,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        tensors = {"scores": trained.scores.contiguous(), "gates": trained.gates.contiguous()}
        save_file(tensors, scratch / RESULT, metadata={"history": json.dumps(trained.history)})
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Run the job whose file is the only argument."""
    quiet_libraries()
    try:
        work(Path(sys.argv[1]))
    except InfopruneError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
