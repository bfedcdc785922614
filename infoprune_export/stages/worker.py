"""One of the processes that `processes` starts: ``python -m infoprune_export.stages.worker JOB.json``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from infoprune_export.console import quiet_libraries
from infoprune_export.errors import InfopruneError
from infoprune_export.pipeline import Run
from infoprune_export.recipe import Recipe
from infoprune_export.stages import MAKERS
from infoprune_export.stages.processes import MADE
from infoprune_export.training.accelerator import start_accelerator
from infoprune_export.training.launch import tell


@dataclass
class _Share(Run):
    """A run as one of several processes sees it: on its own device, progress told by the first."""

    scratch: Path = Path()
    processes: int = 1
    tells: bool = False
    parent: int = 0

    def track(self, title: str, total: int) -> Callable[[int], None]:
        def advance(count: int) -> None:
            if os.getppid() != self.parent:
                raise InfopruneError("the process that started this stage is gone")
            if self.tells:
                tell(self.scratch, {"title": title, "total": total, "advance": count * self.processes})

        return advance


def work(job_file: Path) -> None:
    """Make the job's stage together with the other processes."""
    parent = os.getppid()
    job = json.loads(job_file.read_text(encoding="utf-8"))
    recipe, scratch = Recipe.model_validate(job["recipe"]), Path(job["scratch"])
    accelerator = start_accelerator("no", job["device"])
    run = _Share(
        recipe,
        Path(job["folder"]),
        Progress(disable=True),
        finished={stage: Path(path) for stage, path in job["finished"].items()},
        scratch=scratch,
        processes=accelerator.num_processes,
        tells=accelerator.is_main_process,
        parent=parent,
    )
    run.__dict__["device"] = str(accelerator.device)  # what Run would find out itself
    folder = scratch / MADE.format(accelerator.process_index)
    folder.mkdir()
    MAKERS[job["stage"]](run, folder)
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
