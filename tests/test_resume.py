"""The real pipeline, killed in every stage: what it ends with is what an undisturbed run ends with, byte for byte."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from finished import small_llava
from forking import SMALL, STAGES, Forked, Forker
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.slow

EPOCH_STATE = ".gates.partial/training.safetensors"
# What to wait for before each kill. The longer stages are cut when there is something in their folder.
KILLS = (
    ("data", ".data.partial/images/*.png"),
    ("baseline", ".baseline.partial"),
    ("gates", ".gates.partial"),
    ("gates", EPOCH_STATE),
    ("heads", ".heads.partial"),
    ("ffn", ".ffn.partial"),
    ("recovery", ".recovery.partial/training.safetensors"),
    ("checkpoint", ".checkpoint.partial/*"),
    ("accuracy", ".accuracy.partial"),
    ("onnx", ".onnx.partial/original"),
    ("engine", ".engine.partial/*"),
    ("validation", ".validation.partial"),
)


@dataclass(frozen=True)
class Command:
    """`infoprune-export` on a part of the testbed model, which nobody else writes to."""

    model: Path
    forker: Forker

    def start(self, verb: str, folder: Path, *overrides: str) -> Forked:
        pairs = (f"model.name_or_path={self.model}", *SMALL, *overrides)
        settings = (word for pair in pairs for word in ("--set", pair))
        return self.forker.start([verb, "quickstart", "--output", str(folder), "--device", "cpu", *settings])

    def run(self, verb: str, folder: Path, *overrides: str) -> tuple[int, str]:
        process = self.start(verb, folder, *overrides)
        try:
            return process.wait(), process.stderr()
        finally:
            process.kill()

    def kill(self, verb: str, folder: Path, pattern: str) -> None:
        """Start, and kill the whole process group as soon as there is a file of this pattern."""
        process = self.start(verb, folder)
        deadline = time.monotonic() + 300
        while not any(folder.glob(pattern)):
            if (code := process.poll()) is not None:
                pytest.fail(f"ended with {code} before {pattern} appeared: {process.stderr()}")
            assert time.monotonic() < deadline, f"no {pattern} in {folder}"
            time.sleep(0.0005)
        assert process.kill() == -signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def forker(factory: pytest.TempPathFactory, seed: int) -> Iterator[Forker]:
    made = Forker.launch(factory.mktemp("stderr"), {"PYTHONHASHSEED": str(seed)})
    yield made
    made.close()


# Whatever depends on the order of a set shall differ between the reference and the rest every time.


@pytest.fixture(scope="module")
def first_forker(tmp_path_factory) -> Iterator[Forker]:
    yield from forker(tmp_path_factory, 0)


@pytest.fixture(scope="module")
def second_forker(tmp_path_factory) -> Iterator[Forker]:
    yield from forker(tmp_path_factory, 1)


@pytest.fixture(scope="module")
def command(tmp_path_factory, second_forker) -> Command:
    model = tmp_path_factory.mktemp("model") / "tiny-llava"
    small_llava(model)
    return Command(model, second_forker)


@pytest.fixture(scope="module")
def reference(command, first_forker, tmp_path_factory) -> Path:
    """An undisturbed run up to its verdict."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    code, stderr = Command(command.model, first_forker).run("validate", folder)
    verdict = json.loads((folder / "validation" / "validation.json").read_text())["verdict"]
    assert code == {"PASS": 0, "FAIL": 1}[verdict], stderr
    return folder


@dataclass(frozen=True)
class Killed:
    folder: Path
    """Killed in every stage, then brought to its end."""
    in_training: Path
    """A copy as it was when the training of the gates had been killed behind an epoch."""


@pytest.fixture(scope="module")
def killed(command, reference, tmp_path_factory) -> Killed:
    top = tmp_path_factory.mktemp("killed")
    folder = top / "run"
    for stage, pattern in KILLS:
        for _ in range(5):
            command.kill("validate", folder, pattern)
            if not (folder / stage).exists():
                break
            # The stage ended in the moment between the look and the kill; once more.
            shutil.rmtree(folder / stage)
        else:
            pytest.fail(f"{stage} was never cut")
        if pattern == EPOCH_STATE:
            shutil.copytree(folder, top / "in-training")
    code, stderr = command.run("validate", folder)
    assert code in (0, 1), stderr
    return Killed(folder, top / "in-training")


# ── Killed and resumed ───────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(reference, killed, stage):
    expected, actual = content(reference / stage), content(killed.folder / stage)
    assert len(expected) > 1
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []


def test_nothing_but_stages_is_left_of_a_killed_run(reference, killed):
    for folder in (reference, killed.folder):
        assert sorted(p.name for p in folder.iterdir()) == sorted([".lock", "recipe.json", *STAGES])


def test_no_artefact_names_the_folder_it_was_made_in(reference):
    for name, data in content(reference).items():
        assert str(reference.parent).encode() not in data, name


def test_gate_training_continues_behind_the_last_epoch(command, reference, killed, tmp_path):
    """A mark in the stored history comes out again, so the epoch before the kill was not computed a second time."""
    folder = tmp_path / "run"
    shutil.copytree(killed.in_training, folder)
    state = folder / EPOCH_STATE
    with safe_open(state, "np") as file:
        history = json.loads(file.metadata()["history"])
    whole = json.loads((reference / "gates" / "history.json").read_text())
    assert 1 <= len(history) <= len(whole) == 3
    assert history == whole[: len(history)]
    history[0]["task"] = 123.0
    save_file(load_file(state), state, metadata={"history": json.dumps(history)})
    code, stderr = command.run("train-gates", folder)
    assert code == 0, stderr
    assert json.loads((folder / "gates" / "history.json").read_text()) == [{**whole[0], "task": 123.0}, *whole[1:]]
    weights = "gates.safetensors"
    assert (folder / "gates" / weights).read_bytes() == (reference / "gates" / weights).read_bytes()


# ── Reused and refused ───────────────────────────────────────────────────────


@pytest.fixture
def moved(reference, tmp_path) -> Path:
    """The finished run, in another place."""
    return shutil.copytree(reference, tmp_path / "moved")


@pytest.mark.exhaustive
def test_another_keep_ratio_makes_only_what_depends_on_it(command, moved):
    before = identities(moved)
    code, stderr = command.run("validate", moved, "tokens.keep_ratio=2/9")
    assert code in (0, 1), stderr
    after = identities(moved)
    again = {"accuracy", "onnx", "engine", "validation"}
    for name in before.keys() | after.keys():
        stage = name.split("/")[0]
        if stage in STAGES:
            assert (before.get(name) != after.get(name)) == (stage in again), name
    validation = json.loads((moved / "validation" / "validation.json").read_text())
    # ceil(64 * 2/9)
    assert validation["size"]["visual_tokens"] == {"original": 64, "compressed": 15}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("damage", "word"), [(_flip, "corrupt"), (Path.unlink, "missing")])
def test_a_damaged_artefact_ends_the_run_with_its_name(command, moved, damage: Callable[[Path], None], word):
    damage(moved / "heads" / "weights.safetensors")
    before = identities(moved)
    code, stderr = command.run("rewrite", moved)
    assert code == 2
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {moved / 'heads' / 'weights.safetensors'}: artefact is {word}")
    assert "Traceback" not in stderr
    ignored = {"recipe.json", ".lock"}
    assert {k: v for k, v in identities(moved).items() if k not in ignored} == {
        k: v for k, v in before.items() if k not in ignored
    }
