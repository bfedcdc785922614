"""Killed at any moment: a stage is there as a whole or not at all, and the same command goes on from what is left."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from infoprune_export.artifacts import MANIFEST, read_manifest, verify
from infoprune_export.errors import is_interrupt
from infoprune_export.pipeline import Run, Stage, execute
from infoprune_export.recipe import Recipe

FILES = 12


def chain(pause: float = 0.0, resumable: bool = False) -> dict[str, Stage]:
    """Three stages, each of several files made from the one before."""

    def make(run: Run, folder: Path) -> None:
        above = [run.folder_of(need) for need in stages[folder.name.split(".")[1]].needs]
        before = sum(len(path.read_bytes()) for place in above for path in place.glob("*.txt"))
        for number in range(FILES):
            (folder / f"{number}.txt").write_text(f"{before} {number} " * 50)
            time.sleep(pause)

    stages: dict[str, Stage] = {}
    for name, needs in (("data", ()), ("heads", ("data",)), ("ffn", ("heads",))):
        stages[name] = Stage(name, name, needs, lambda recipe: {"seed": recipe.seed}, make, resumable, uses_model=False)
    return stages


def run_in(folder: Path, seed: int, **options: Any) -> None:
    recipe = Recipe.model_validate({"name": "t", "seed": seed, "model": {"name_or_path": "x"}})
    execute(Run(recipe, folder, Progress(disable=True)), chain(**options), "ffn")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(folder: Path, seed: int, **options: Any) -> int:
    """`run_in` in a process of its own, which ends with 0 when it is through."""
    numbers = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        return pid
    code = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        run_in(folder, seed, **options)
        code = 0
    except BaseException as error:
        if is_interrupt(error):
            code = 130
        else:
            traceback.print_exc()
    finally:
        os._exit(code)


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_at_random_moments_is_whole_or_absent_and_ends_alike(tmp_path, number, resumable):
    """Every second run has other settings than the one before, so that finished folders are replaced, too."""
    rng = random.Random(int(number))
    run_in(tmp_path / "whole", 0)
    folder = tmp_path / "run"
    killed = 0
    for turn in range(16):
        pid = start(folder, turn % 2, pause=0.0002, resumable=resumable)
        time.sleep(rng.uniform(0, 0.025))
        os.kill(pid, number)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -number, *([130] if number == signal.SIGINT else [])), code
        killed += code != 0
        for name in ("data", "heads", "ffn"):
            if (folder / name).exists():
                manifest = read_manifest(folder / name)
                assert manifest is not None, f"{name} has no manifest"
                verify(folder / name, manifest)
                assert len(manifest["outputs"]) == FILES
        if (recipe := folder / "recipe.json").exists():
            assert json.loads(recipe.read_text())["name"] == "t"
    assert killed > 3
    run_in(folder, 0)
    # A stage that can resume keeps what was begun with the other settings for them.
    begun = {name for name in content(folder) if resumable and name.split("/")[0].endswith(".partial")}
    assert {name: data for name, data in content(folder).items() if name not in begun} == content(tmp_path / "whole")


@pytest.mark.parametrize("place", ["first", "second"])
def test_killed_between_the_two_renames_of_a_replacement(tmp_path, place):
    """The old folder may be away, but then nothing is half there, and the next run makes the new one."""
    folder = tmp_path / "run"
    run_in(folder, 0)
    pid = os.fork()
    if not pid:
        rename, seen = Path.rename, []

        def cut(self: Path, target: Path) -> Path:
            seen.append(self)
            if len(seen) == (1 if place == "first" else 2):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = cut
        run_in(folder, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert (folder / "data" / MANIFEST).exists() == (place == "first")
    run_in(folder, 1)
    run_in(tmp_path / "whole", 1)
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.parametrize("resumable", [False, True])
def test_what_a_kill_left_beside_a_finished_stage_goes_although_nothing_is_made(tmp_path, resumable):
    """Other settings were tried, the run killed, and the settings taken back."""
    folder = tmp_path / "run"
    run_in(folder, 0, resumable=resumable)
    whole = content(folder)
    pid = os.fork()
    if not pid:
        write = Path.write_text

        def cut(self: Path, *arguments: Any, **options: Any) -> int:
            if self == folder / ".data.partial" / "3.txt":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, *arguments, **options)

        Path.write_text = cut
        run_in(folder, 1, resumable=resumable)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    begun = {name: data for name, data in content(folder).items() if name.startswith(".data.partial/")}
    assert len(begun) == 3 + resumable
    # As a kill between a replacement's last rename and the removal of the old folder leaves it.
    (folder / ".heads.retired").mkdir()
    (folder / ".heads.retired" / "0.txt").write_text("old")
    run_in(folder, 0, resumable=resumable)
    assert content(folder) == (whole | begun if resumable else whole)


def test_a_clock_that_goes_backwards_makes_nothing_again(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run_in(folder, 0)
    for path in folder.rglob("*"):
        os.utime(path, (4e9, 4e9))  # in the year 2096
    before = {path: path.stat().st_mtime for path in folder.rglob("*.txt")}
    for clock in ("time", "monotonic"):
        monkeypatch.setattr(time, clock, iter(range(10**6, 0, -1)).__next__)
    run_in(folder, 0)
    assert {path: path.stat().st_mtime for path in folder.rglob("*.txt")} == before
    run_in(folder, 1)
    run_in(tmp_path / "whole", 1)
    assert content(folder) == content(tmp_path / "whole")
