"""The real command in processes of its own: interrupted, ended, twice in one folder, short of memory, on full disks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from forking import SMALL, STAGES, Forked, Forker

from infoprune_export.artifacts import MANIFEST, read_manifest, verify
from infoprune_export.data import testbed

pytestmark = pytest.mark.slow


class Command:
    def __init__(self, forker: Forker, model: Path) -> None:
        self.forker, self.model = forker, model

    def start(self, verb: str, folder: Path, *overrides: str, limits: dict[str, int] | None = None) -> Forked:
        pairs = (f"model.name_or_path={self.model}", *SMALL, *overrides)
        words = [word for pair in pairs for word in ("--set", pair)]
        return self.forker.start([verb, "quickstart", "--output", str(folder), "--device", "cpu", *words], limits)

    def run(self, verb: str, folder: Path, *overrides: str, limits: dict[str, int] | None = None) -> tuple[int, str]:
        process = self.start(verb, folder, *overrides, limits=limits)
        return process.wait(), process.stderr()


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Iterator[Command]:
    model = tmp_path_factory.mktemp("model") / "tiny-llava"
    shutil.copytree(testbed.checkpoint("testbed/tiny-llava"), model)
    forker = Forker.launch(tmp_path_factory.mktemp("stderr"), {"OMP_NUM_THREADS": "1"})
    yield Command(forker, model)
    forker.close()


def wait_for(process: Forked, folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.stderr()
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.001)


def one_line(stderr: str) -> str:
    """The command's last word, which is all it says of the fault."""
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert stderr.rstrip("\n").endswith(errors[0])
    return errors[0]


def only_whole_stages(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in found:
        manifest = read_manifest(folder / name)
        assert manifest is not None, name
        verify(folder / name, manifest)
    return found


def content(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_ctrl_c_in_training_ends_with_130_and_is_taken_up(command, tmp_path):
    folder = tmp_path / "run"
    process = command.start("train-gates", folder)
    wait_for(process, folder, ".gates.partial/training.safetensors")
    assert process.kill(signal.SIGINT) == 130
    assert process.stderr().splitlines()[-1] == "interrupted; run the same command again to resume"
    assert "Traceback" not in process.stderr()
    assert only_whole_stages(folder) == ["data"]
    assert (folder / ".gates.partial" / "training.safetensors").is_file()
    code, stderr = command.run("train-gates", folder)
    assert code == 0, stderr
    assert only_whole_stages(folder) == ["budget", "data", "gates", "heads"]


def test_two_commands_in_one_folder(command, tmp_path):
    """The second is refused in one line and disturbs nothing; the first ends well."""
    folder = tmp_path / "run"
    first = command.start("train-gates", folder)
    wait_for(first, folder, ".gates.partial")
    code, stderr = command.run("train-gates", folder, "heads.epochs=2")
    assert code == 2
    line = one_line(stderr)
    assert f"{folder}: another run is at work here; wait for it or choose another --output" in line
    assert first.wait() == 0, first.stderr()
    assert only_whole_stages(folder) == ["budget", "data", "gates", "heads"]


@pytest.mark.parametrize(("verb", "beyond"), [("train-gates", 30 * 2**20), ("train-gates", 200 * 2**20)])
def test_too_little_memory_is_one_line(command, tmp_path, verb, beyond):
    """Of its address space the process may take no more than a little beyond what its imports have."""
    folder = tmp_path / "run"
    code, stderr = command.run(verb, folder, limits={"RLIMIT_AS": beyond})
    assert code == 2, stderr
    # ONNX Runtime, which is imported late, words it itself.
    assert any(words in one_line(stderr) for words in ("out of memory", "onnxruntime cannot be imported"))
    assert not folder.exists() or set(only_whole_stages(folder)) <= {"data"}


# ── Every stage ──────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, stderr = command.run("validate", folder)
    assert code in (0, 1), stderr
    return folder


def blocks_of(files: Iterable[Path]) -> int:
    return sum(-(path.stat().st_size // -4096) * 4096 for path in files if path.is_file())


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_in_every_stage(command, whole, tmp_path, stage):
    """A disk with room for all but this stage; when there is room, the run goes on to its end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size + 8192 for path in whole.rglob("*")) * 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=4096", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        folder = shutil.copytree(whole, disk / "run")
        shutil.rmtree(folder / stage)
        # The recipe is written again before any stage.
        room = blocks_of([folder / "recipe.json"])
        (disk / "ballast").mkdir()
        (disk / "ballast" / "blocks").write_bytes(bytes(shutil.disk_usage(disk).free - room))
        if blocks_of((whole / stage).rglob("*")) <= room:
            # It would fit where the recipe did: leave no more than one name, which its folder takes.
            for number in range(os.statvfs(disk).f_ffree - 1):
                (disk / "ballast" / f"{number}").touch()
        code, stderr = command.run("validate", folder)
        assert code == 2, stderr
        line = one_line(stderr)
        assert "the disk is full" in line
        assert any(f"{folder}/{name}" in line for name in (stage, f".{stage}.partial")), line
        assert not (folder / stage).exists()
        only_whole_stages(folder)
        shutil.rmtree(disk / "ballast")
        code, stderr = command.run("validate", folder)
        assert code in (0, 1), stderr
        assert content(folder / stage).keys() == content(whole / stage).keys()
        assert (folder / stage / MANIFEST).is_file()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", STAGES)
def test_too_little_memory_in_every_stage(command, whole, tmp_path, stage):
    """With less and less of it: the line names a stage that was not there, or says what could not be loaded."""
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / stage)
    for beyond in (32 * 2**20, 128 * 2**20, 512 * 2**20):
        code, stderr = command.run("validate", folder, limits={"RLIMIT_AS": beyond})
        if code in (0, 1):
            break
        assert code == 2, stderr
        words = ("out of memory", "cannot be loaded", "onnxruntime cannot be imported")
        assert any(word in one_line(stderr) for word in words)
        only_whole_stages(folder)
    code, stderr = command.run("validate", folder)
    assert code in (0, 1), stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_at_random_moments(command, whole, tmp_path, number):
    """A run that is ended again and again comes to the bytes of one that is not."""
    rng = random.Random(int(number))
    folder = tmp_path / "run"
    for _ in range(40):
        process = command.start("validate", folder)
        time.sleep(rng.uniform(0.05, 4))
        code = process.kill(number)
        if code in (0, 1):
            break
        assert code == (130 if number == signal.SIGINT else -number), (code, process.stderr())
        assert "Traceback" not in process.stderr()
        if folder.exists():
            only_whole_stages(folder)
    code, stderr = command.run("validate", folder)
    assert code in (0, 1), stderr
    assert content(folder) == content(whole)
