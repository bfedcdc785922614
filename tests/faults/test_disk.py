"""Disks that are full, read-only, or gone: real ones where this user may mount them."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress
from safetensors.numpy import save_file

from infoprune_export.artifacts import staged, write_text
from infoprune_export.errors import InfopruneError
from infoprune_export.pipeline import Run, Stage, execute
from infoprune_export.recipe import Recipe

SIZE = 512 * 1024


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(error: pytest.ExceptionInfo[InfopruneError], *words: str) -> None:
    message = str(error.value)
    assert message.splitlines() == [message]
    for word in words:
        assert word in message


def write_bytes(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(2 * SIZE))


def write_tensors(folder: Path) -> None:
    save_file({"a": np.zeros(2 * SIZE, np.uint8)}, folder / "a.safetensors")


def write_array(folder: Path) -> None:
    np.save(folder / "a.npy", np.zeros(2 * SIZE, np.uint8))


def write_many(folder: Path) -> None:
    for number in range(10_000):
        (folder / f"{number}.txt").write_text("x" * 4096)


WRITERS = (write_bytes, write_tensors, write_array, write_many)


def stages_with(write, resumable: bool = False) -> dict[str, Stage]:
    def make(run: Run, folder: Path) -> None:
        if run.recipe.seed == 0:
            write(folder)
        (folder / "small.txt").write_text("enough")

    first = Stage("data", "", (), lambda recipe: {}, lambda run, folder: None, uses_model=False)
    second = Stage("heads", "", ("data",), lambda recipe: {"seed": recipe.seed}, make, resumable, uses_model=False)
    return {"data": first, "heads": second}


def run(folder: Path, stages: dict[str, Stage], seed: int) -> Path:
    recipe = Recipe.model_validate({"name": "t", "seed": seed, "model": {"name_or_path": "x"}})
    return execute(Run(recipe, folder, Progress(disable=True)), stages, "heads")


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_one_line_and_what_fits_fits_afterwards(disk, write, resumable):
    stages = stages_with(write, resumable)
    (disk / "ballast").write_bytes(bytes(SIZE // 8))
    with pytest.raises(InfopruneError) as caught:
        run(disk / "run", stages, 0)
    refused(caught, str(disk / "run" / "heads"), "the disk is full", "run the same command again")
    assert not (disk / "run" / "heads").exists()
    assert (disk / "run" / "data" / "manifest.json").is_file()
    (disk / "ballast").unlink()
    # What is left behind of a stage that can resume is forgotten by one with other settings.
    assert (run(disk / "run", stages, 1) / "small.txt").read_text() == "enough"


def test_not_even_a_manifest_fits(disk):
    (disk / "ballast").write_bytes(bytes(SIZE - 3 * resource.getpagesize()))
    with pytest.raises(InfopruneError) as caught:
        run(disk / "run", stages_with(write_bytes), 1)
    refused(caught, str(disk), "the disk is full")
    (disk / "ballast").unlink()
    run(disk / "run", stages_with(write_bytes), 1)


def test_a_read_only_disk_is_named(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk, disk / "run"):
        with pytest.raises(InfopruneError) as caught:
            run(folder, stages_with(write_bytes), 1)
        refused(caught, str(folder), "--output")


@pytest.mark.parametrize("write", [write_bytes, write_array])
def test_a_limit_on_the_size_of_files(tmp_path, write):
    """As ``ulimit -f`` sets it, or a FAT file system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, hard))
    try:
        with pytest.raises(InfopruneError) as caught:
            run(tmp_path / "run", stages_with(write), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(caught, str(tmp_path / "run" / "heads"), "--output")
    assert not (tmp_path / "run" / "heads").exists()
    run(tmp_path / "run", stages_with(write), 0)


# ── Gone ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["staging", "run"])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("write", [lambda folder: None, lambda folder: (folder / "a").write_text("a"), write_tensors])
def test_a_folder_that_vanishes_in_a_stage(tmp_path, what, moved, write):
    folder = tmp_path / "run"

    def lose(staging: Path) -> None:
        gone = staging if what == "staging" else folder
        gone.rename(tmp_path / "elsewhere") if moved else shutil.rmtree(gone)
        write(staging)

    with pytest.raises(InfopruneError) as caught:
        run(folder, stages_with(lose), 0)
    refused(caught, str(folder / "heads"), "vanished", "run the same command again")
    assert (run(folder, stages_with(lose), 1) / "small.txt").read_text() == "enough"


def test_a_defect_that_has_nothing_to_do_with_the_folder_keeps_its_type(tmp_path):
    with pytest.raises(FileNotFoundError), staged(tmp_path / "heads"):
        (tmp_path / "nowhere" / "a").write_text("a")
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "heads"):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["x" * 256, "图" * 86, "é" * 128], ids=("ascii", "chinese", "accents"))
def test_a_name_longer_than_file_systems_take(tmp_path, name):
    with pytest.raises(InfopruneError) as caught:
        run(tmp_path / name, stages_with(write_bytes), 1)
    refused(caught, "--output")
    with pytest.raises(InfopruneError) as caught:
        write_text(tmp_path / name, "a")
    refused(caught, "File name too long")


@pytest.mark.parametrize("name", ["x" * 255, "图" * 85, "a b", "-o", "[red]", "a\tb", "%s{0}", "\u202egnp", "~"])
def test_unusual_names_are_names(tmp_path, name):
    run(tmp_path / name, stages_with(write_bytes), 1)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [".lock", "data", "heads", "recipe.json"]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\rb"])
def test_control_characters_of_a_name_stay_out_of_the_message(tmp_path, name):
    (tmp_path / name / "heads").mkdir(parents=True)
    with pytest.raises(InfopruneError) as caught:
        run(tmp_path / name, stages_with(write_bytes), 1)
    refused(caught, "no finished stage")
    assert str(caught.value).isprintable()
