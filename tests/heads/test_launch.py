"""Several training processes: the same gates as one, and what is said when one of them dies."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.heads.launch import train_in_processes
from infoprune_export.heads.train import Progress, Trained, train_gates
from infoprune_export.models.vlm import load, writable_copy
from infoprune_export.recipe import DataSpec, HeadsSpec, Recipe
from infoprune_export.training import launch
from infoprune_export.training.state import STATE

TINY = {
    "name": "two",
    "model": {"name_or_path": "testbed/tiny-llava"},
    "data": {"calibration_images": 9, "validation_questions": 4},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    dataset.draw_scenes(folder, DataSpec(**TINY["data"]), seed=0)
    return folder


def recipe_of(**heads: object) -> Recipe:
    return Recipe(**{**TINY, "heads": HeadsSpec(**{"method": "budgeted", "processes": 2, **heads})})


def train_here(recipe: Recipe, drawn: Path, scratch: Path, seen: list[Progress]) -> Trained:
    vlm = load(recipe.model)
    return train_gates(
        writable_copy(vlm),
        vlm.tower,
        dataset.read(recipe.data, drawn).calibration,
        recipe.heads,
        labelled=True,
        seed=0,
        scratch=scratch,
        on_step=seen.append,
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_interrupted_leave_state_that_one_continues_to_the_same_gates(drawn, tmp_path):
    """Workers die with their parent's interrupt. Budgeted gates of two processes: see test_stages."""
    recipe = recipe_of(method="hard_concrete", epochs=2, batch_size=9)
    pids: list[int] = []
    told: list[Progress] = []

    class Interrupted(Exception):
        pass

    def ours(process: Path) -> bool:
        try:
            return str(tmp_path).encode() in (process / "cmdline").read_bytes()
        except OSError:
            return False

    def interrupt(progress: Progress) -> None:
        told.append(progress)
        pids[:] = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and ours(path)]
        raise Interrupted

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.mkdir()
    whole.mkdir()
    with pytest.raises(Interrupted):
        train_in_processes(recipe.to_dict(), drawn, "cpu", 2, cut, interrupt)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [path.name for path in cut.iterdir()] == [STATE]
    alone: list[Progress] = []
    expected = train_here(recipe, drawn, whole, alone)
    assert told[0].terms == pytest.approx(alone[0].terms, rel=1e-4)
    resumed = train_here(recipe, drawn, cut, [])
    torch.testing.assert_close(resumed.scores, expected.scores, rtol=0, atol=1e-4)
    assert (expected.scores - 2.0).abs().min() > 1e-2, "every gate must have moved"


# ── One that dies ────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_workers_own_refusal_is_what_the_user_reads(drawn, tmp_path):
    recipe = recipe_of(epochs=1, mixed_precision="fp16").to_dict()
    with pytest.raises(InfopruneError) as refused:
        train_in_processes(recipe, drawn, "cpu", 2, tmp_path)
    assert "gate training: process" in str(refused.value)
    assert "ended with code 1: error: heads.mixed_precision = 'fp16' needs a GPU" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def script(tmp_path: Path, monkeypatch, body: str) -> None:
    """Workers that run this instead of training."""
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return real([command[0], "-c", body, command[-1]], **options)

    monkeypatch.setattr(launch.subprocess, "Popen", start)


def test_a_killed_worker_ends_the_others_and_is_named(tmp_path, monkeypatch):
    script(
        tmp_path, monkeypatch, "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    started = time.monotonic()
    with pytest.raises(InfopruneError, match=r"process 1 of 3 ended with code -9; train with heads.processes = 1"):
        train_in_processes({}, tmp_path, "cpu", 3, tmp_path)
    assert time.monotonic() - started < 20
    assert list(tmp_path.iterdir()) == []


def test_the_first_to_die_is_the_one_that_is_named(tmp_path, monkeypatch):
    spoken = tmp_path / "spoken"
    body = (
        "import os, sys, time\nfrom pathlib import Path\n"
        f"spoken = Path({str(spoken)!r})\n"
        "if os.environ['RANK'] == '0':\n"
        "    while not spoken.exists(): time.sleep(0.01)\n"
        # as late as a real peer at least, and later than any file system's clock is coarse
        "    time.sleep(0.2)\n"
        "    sys.exit('peer is gone')\n"
        "print('first line\\n\\nMemoryError: 7 GB', file=sys.stderr, flush=True)\nspoken.touch()\nsys.exit(1)"
    )
    script(tmp_path, monkeypatch, body)
    monkeypatch.setattr(launch, "_POLL_SECONDS", 1.0)
    with pytest.raises(InfopruneError, match=r"process 1 of 2 ended with code 1: MemoryError: 7 GB; train with"):
        train_in_processes({}, tmp_path, "cpu", 2, tmp_path)


def test_progress_is_followed_line_by_line(tmp_path):
    seen: list[dict[str, object]] = []
    path = tmp_path / "progress.jsonl"
    assert launch._report(path, 0, seen.append) == 0
    lines = [json.dumps({"step": step, "steps": 2, "terms": {"task": 0.5}}) + "\n" for step in (1, 2)]
    path.write_text(lines[0] + lines[1][:9])
    place = launch._report(path, 0, seen.append)
    assert seen == [{"step": 1, "steps": 2, "terms": {"task": 0.5}}]
    path.write_text("".join(lines))
    assert launch._report(path, place, seen.append) == len("".join(lines))
    assert [line["step"] for line in seen] == [1, 2]


def test_workers_are_told_who_they_are(tmp_path, monkeypatch):
    body = (
        "import os, sys, time\nnames = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'ACCELERATE_USE_CPU']\n"
        "time.sleep(60 if os.environ['RANK'] == '0' else 0)\nsys.exit(' '.join(os.environ[n] for n in names))"
    )
    script(tmp_path, monkeypatch, body)
    with pytest.raises(InfopruneError, match=r"code 1: 1 1 2 127.0.0.1 true; train"):
        train_in_processes({}, tmp_path, "cpu", 2, tmp_path)
