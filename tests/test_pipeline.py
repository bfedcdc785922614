"""The runner on small tables of stages that only write text: what is reused, what is made again, what is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from infoprune_export import pipeline
from infoprune_export.artifacts import MANIFEST, sha256_file
from infoprune_export.errors import InfopruneError
from infoprune_export.pipeline import Run, Stage, execute, order
from infoprune_export.recipe import Recipe


def stage(
    name: str,
    *needs: str,
    reads: str = "",
    make: Callable[[Run, Path], None] | None = None,
    uses_model: bool = False,
    resumable: bool = False,
) -> Stage:
    """A stage that writes its recipe section and what its upstream stages wrote."""

    def write(run: Run, folder: Path) -> None:
        content = {need: json.loads((run.folder_of(need) / "out.json").read_text()) for need in needs}
        own = run.recipe.to_dict().get(reads) if reads else None
        (folder / "out.json").write_text(json.dumps([own, content]))

    def recipe_slice(recipe: Recipe) -> dict[str, Any]:
        return {reads: recipe.to_dict()[reads]} if reads else {}

    return Stage(name, f"{name} made", needs, recipe_slice, make or write, resumable=resumable, uses_model=uses_model)


def table(*stages: Stage) -> dict[str, Stage]:
    return {s.name: s for s in stages}


# data ─► left ─► both ─► end
#   └──► right ───┘
DIAMOND = table(
    stage("data", reads="data"),
    stage("left", "data", reads="heads"),
    stage("right", "data", reads="ffn"),
    stage("both", "left", "right", reads="tokens"),
    stage("end", "both"),
    stage("apart", reads="bench"),
)


class Runs:
    """Runs in one folder, with what they printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = ""

    def __call__(
        self,
        stages: dict[str, Stage] = DIAMOND,
        last: str = "end",
        *,
        recipe: dict[str, Any] | None = None,
        device: str = "cpu",
        model: str = "m",
        force: bool = False,
        donor: Path | Sequence[Path] = (),
    ) -> dict[str, str]:
        """Execute, and say of each stage what was done: made, up to date, or shared."""
        stream = io.StringIO()
        progress = Progress(console=Console(file=stream, width=200), disable=True)
        checked = Recipe.model_validate({"name": "t", "model": {"name_or_path": "x"}, **(recipe or {})})
        run = Run(checked, self.folder, progress, donors=(donor,) if isinstance(donor, Path) else tuple(donor))
        # Computing these would load torch; the stages here have no model.
        run.__dict__["device"] = device
        run.__dict__["model_fingerprint"] = {"model.safetensors": model}
        try:
            assert execute(run, stages, last, force=force) == self.folder / last
        finally:
            self.output = stream.getvalue()
        done = {}
        for line in self.output.splitlines():
            name, _, what = line.partition(" ")
            what = what.strip()
            done[name] = what if what in ("up to date", "shared") else "made"
        return done

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path / "run")


def made(done: dict[str, str]) -> set[str]:
    return {name for name, what in done.items() if what == "made"}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file is at each path, and when it was written."""
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (".lock", "recipe.json")
    }


# ── Order ────────────────────────────────────────────────────────────────────


def test_order_puts_what_is_needed_first_and_names_each_stage_once():
    assert order(DIAMOND, "end") == ["data", "left", "right", "both", "end"]
    assert order(DIAMOND, "both") == ["data", "left", "right", "both"]
    assert order(DIAMOND, "apart") == ["apart"]


def test_order_of_the_real_stages_is_upstream_first_and_complete():
    from infoprune_export.stages import STAGES

    ordered = order(STAGES, "report")
    assert sorted(ordered) == sorted(STAGES)
    for position, name in enumerate(ordered):
        assert set(STAGES[name].needs) <= set(ordered[:position]), name
    upstream = ["data", "gates", "budget", "heads", "ffn", "recovery", "language", "checkpoint"]
    assert order(STAGES, "checkpoint") == upstream


def test_only_what_the_last_stage_needs_is_made(runs):
    assert made(runs(last="left")) == {"data", "left"}
    assert sorted(p.name for p in runs.folder.iterdir() if not p.name.startswith(".")) == [
        "data",
        "left",
        "recipe.json",
    ]


# ── Reuse ────────────────────────────────────────────────────────────────────


def test_a_second_run_touches_nothing(runs):
    assert made(runs()) == {"data", "left", "right", "both", "end"}
    before = identities(runs.folder)
    assert set(runs().values()) == {"up to date"}
    assert identities(runs.folder) == before


def test_a_longer_run_makes_only_the_rest(runs):
    runs(last="left")
    assert runs() == {"data": "up to date", "left": "up to date", "right": "made", "both": "made", "end": "made"}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"data": {"calibration_images": 3}}, {"data", "left", "right", "both", "end"}),
        ({"heads": {"remove": 0.25}}, {"left", "both", "end"}),
        ({"ffn": {"keep_macs": 0.25}}, {"right", "both", "end"}),
        ({"tokens": {"keep_ratio": "2/9"}}, {"both", "end"}),
        ({"bench": {"rounds": 9}}, set()),
        ({"description": "other words", "name": "other"}, set()),
    ],
)
def test_a_changed_slice_makes_itself_and_its_dependants_again(runs, change, again):
    runs()
    assert made(runs(recipe=change)) == again
    fresh = Runs(runs.folder.with_name("fresh"))
    fresh(recipe=change)
    for name in order(DIAMOND, "end"):
        for file in ("out.json", MANIFEST):
            assert (runs[name] / file).read_bytes() == (fresh[name] / file).read_bytes(), name


def test_a_change_taken_back_makes_it_again_with_the_same_bytes(runs):
    runs()
    before = {name: sha256_file(runs[name] / MANIFEST) for name in DIAMOND if name != "apart"}
    runs(recipe={"heads": {"remove": 0.25}})
    assert sha256_file(runs["end"] / MANIFEST) != before["end"]
    runs()
    assert {name: sha256_file(runs[name] / MANIFEST) for name in before} == before


def test_an_upstream_stage_made_again_with_equal_bytes_changes_nothing_behind_it(runs):
    runs()
    assert runs(last="data", force=True) == {"data": "made"}
    assert runs() == dict.fromkeys(("data", "left", "right", "both", "end"), "up to date")


def test_model_and_device_count_for_stages_that_use_them(runs):
    stages = table(stage("data", uses_model=False), stage("gates", "data", uses_model=True), stage("end", "gates"))
    runs(stages)
    assert made(runs(stages, model="another")) == {"gates", "end"}
    assert made(runs(stages, model="another", device="cuda")) == {"gates", "end"}
    assert made(runs(stages, model="another", device="cuda")) == set()


def test_library_versions_count(runs, monkeypatch):
    runs()
    monkeypatch.setattr(pipeline, "library_versions", lambda: {"torch": "0.1"})
    assert made(runs(last="data")) == {"data"}


def test_the_manifest_says_what_made_the_stage(runs):
    runs()
    manifest = json.loads((runs["both"] / MANIFEST).read_text())
    assert manifest["stage"] == "both"
    assert manifest["inputs"] == {name: sha256_file(runs[name] / MANIFEST) for name in ("left", "right")}
    assert manifest["recipe"].keys() == {"tokens"}
    assert manifest["outputs"] == {"out.json": sha256_file(runs["both"] / "out.json")}
    assert str(runs.folder) not in (runs["both"] / MANIFEST).read_text()


def test_the_recipe_as_it_was_run_is_kept_beside_the_stages(runs):
    runs(recipe={"seed": 7})
    kept = json.loads((runs["recipe.json"]).read_text())
    assert Recipe.model_validate(kept).seed == 7


# ── Force ────────────────────────────────────────────────────────────────────


def test_force_makes_the_last_stage_again_and_only_it(runs):
    runs()
    before = identities(runs.folder)
    assert made(runs(force=True)) == {"end"}
    after = identities(runs.folder)
    assert {name for name in before if after[name] != before[name]} == {"end/out.json", f"end/{MANIFEST}"}


def test_force_does_not_read_what_it_replaces(runs):
    runs()
    (runs["end"] / "out.json").write_text("damaged")
    with pytest.raises(InfopruneError, match="corrupt"):
        runs()
    assert made(runs(force=True)) == {"end"}
    assert set(runs().values()) == {"up to date"}


def test_a_forced_stage_that_fails_leaves_the_old_one(runs):
    runs()
    before = identities(runs.folder)

    def fail(run: Run, folder: Path) -> None:
        (folder / "half").touch()
        raise InfopruneError("no")

    with pytest.raises(InfopruneError, match=r"^no$"):
        runs({**DIAMOND, "end": stage("end", "both", make=fail)}, force=True)
    assert identities(runs.folder) == before


# ── Donor ────────────────────────────────────────────────────────────────────


def test_equal_stages_are_taken_from_a_donor(tmp_path, runs):
    runs()
    before = identities(runs.folder)
    child = Runs(tmp_path / "child")
    done = child(recipe={"ffn": {"keep_macs": 0.25}}, donor=runs.folder)
    assert done == {"data": "shared", "left": "shared", "right": "made", "both": "made", "end": "made"}
    assert identities(runs.folder) == before
    for name in ("data", "left"):
        for file in ("out.json", MANIFEST):
            assert (child[name] / file).read_bytes() == (runs[name] / file).read_bytes()
    assert set(child(recipe={"ffn": {"keep_macs": 0.25}}).values()) == {"up to date"}


def test_a_stage_is_taken_from_the_first_of_several_donors_that_has_it(tmp_path, runs):
    runs()
    other, child = Runs(tmp_path / "other"), Runs(tmp_path / "child")
    change = {"ffn": {"keep_macs": 0.25}}
    other(recipe=change, donor=runs.folder)
    assert set(child(recipe=change, donor=[runs.folder, other.folder]).values()) == {"shared"}
    assert (child["data"] / "out.json").samefile(runs["data"] / "out.json")
    assert (child["end"] / "out.json").samefile(other["end"] / "out.json")


def test_a_run_without_donor_and_one_with_end_with_the_same_bytes(tmp_path, runs):
    runs()
    change = {"heads": {"remove": 0.25}}
    alone, sharing = Runs(tmp_path / "alone"), Runs(tmp_path / "sharing")
    alone(recipe=change)
    sharing(recipe=change, donor=runs.folder)
    assert sha256_file(alone["end"] / MANIFEST) == sha256_file(sharing["end"] / MANIFEST)


def test_stages_are_copied_where_the_disk_knows_no_links(tmp_path, runs, monkeypatch):
    def refuse(*args: Any) -> None:
        raise OSError(95, "Operation not supported")

    runs()
    monkeypatch.setattr(pipeline.os, "link", refuse)
    child = Runs(tmp_path / "child")
    assert set(child(donor=runs.folder).values()) == {"shared"}
    assert (child["end"] / "out.json").stat().st_ino != (runs["end"] / "out.json").stat().st_ino


def test_a_damaged_donor_is_named_and_nothing_is_taken(tmp_path, runs):
    runs()
    (runs["left"] / "out.json").write_text("damaged")
    child = Runs(tmp_path / "child")
    with pytest.raises(InfopruneError) as caught:
        child(donor=runs.folder)
    assert str(runs["left"] / "out.json") in str(caught.value)
    assert not child["left"].exists()


def test_making_a_shared_stage_again_leaves_the_donor_alone(tmp_path, runs):
    runs()
    before = identities(runs.folder)
    child = Runs(tmp_path / "child")
    child(donor=runs.folder)
    child(recipe={"data": {"prompts": ["another"]}}, donor=runs.folder)
    assert identities(runs.folder) == before
    assert set(runs().values()) == {"up to date"}


# ── Damage ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["data", "left", "end"])
def test_a_corrupt_artefact_is_named_instead_of_used(runs, name):
    runs()
    path = runs[name] / "out.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InfopruneError) as caught:
        runs()
    assert str(caught.value).startswith(f"{path}: artefact is corrupt")
    assert str(runs[name]) in str(caught.value).partition("delete")[2]


def test_deleting_the_damaged_folder_as_advised_mends_the_run(runs):
    runs()
    before = sha256_file(runs["end"] / MANIFEST)
    (runs["left"] / "out.json").unlink()
    with pytest.raises(InfopruneError, match="missing"):
        runs()
    for path in runs["left"].iterdir():
        path.unlink()
    runs["left"].rmdir()
    assert made(runs()) == {"left"}
    assert sha256_file(runs["end"] / MANIFEST) == before


def test_a_damaged_manifest_is_named(runs):
    runs()
    (runs["left"] / MANIFEST).write_text("{")
    with pytest.raises(InfopruneError) as caught:
        runs()
    assert str(caught.value).startswith(f"{runs['left'] / MANIFEST}: corrupt manifest")


@pytest.mark.parametrize("kind", ["folder", "empty", "file"])
def test_a_folder_that_is_no_stage_is_never_replaced(runs, kind):
    runs(last="data")
    if kind == "file":
        runs["left"].write_text("mine")
    else:
        runs["left"].mkdir()
        if kind == "folder":
            (runs["left"] / "thesis.txt").write_text("mine")
    before = identities(runs.folder)
    for force in (False, True):
        with pytest.raises(InfopruneError) as caught:
            runs(last="left", force=force)
        assert str(caught.value).startswith(f"{runs['left']}: exists but is no finished stage")
    assert identities(runs.folder) == before


# ── Failure ──────────────────────────────────────────────────────────────────


def failing(error: BaseException) -> Stage:
    def fail(run: Run, folder: Path) -> None:
        (folder / "half").touch()
        raise error

    return stage("left", "data", make=fail)


@pytest.mark.parametrize("error", [InfopruneError("no"), RuntimeError("no"), KeyboardInterrupt()])
def test_a_failed_stage_leaves_what_was_finished_before_it(runs, error):
    with pytest.raises(type(error)):
        runs({**DIAMOND, "left": failing(error)})
    assert sorted(p.name for p in runs.folder.iterdir() if p.name != ".lock") == ["data", "recipe.json"]
    assert made(runs()) == {"left", "right", "both", "end"}


def test_a_run_whose_first_stage_fails_leaves_no_folder(runs):
    with pytest.raises(InfopruneError):
        runs(table(stage("data"), stage("left", make=failing(InfopruneError("no")).make)), "left")
    assert not runs.folder.exists()


def test_a_folder_that_was_there_before_is_never_removed(runs):
    runs.folder.mkdir()
    (runs.folder / "notes.txt").write_text("mine")
    with pytest.raises(InfopruneError):
        runs(table(stage("left", make=failing(InfopruneError("no")).make)), "left")
    assert (runs.folder / "notes.txt").read_text() == "mine"


# ── Lock ─────────────────────────────────────────────────────────────────────


def _hold(path: Path, taken: Any, release: Any) -> None:
    with FileLock(path):
        taken.set()
        release.wait(60)


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(runs):
    runs(last="left")
    before = identities(runs.folder) | {"recipe.json": (runs["recipe.json"]).stat().st_mtime_ns}
    context = multiprocessing.get_context("spawn")
    taken, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(runs.folder / ".lock", taken, release))
    holder.start()
    try:
        assert taken.wait(60)
        with pytest.raises(InfopruneError) as caught:
            runs(recipe={"seed": 9})
        assert str(caught.value).startswith(f"{runs.folder}: another run is at work here")
        assert identities(runs.folder) | {"recipe.json": (runs["recipe.json"]).stat().st_mtime_ns} == before
    finally:
        release.set()
        holder.join(60)
    assert made(runs()) == {"right", "both", "end"}


def test_the_folder_is_locked_while_a_stage_works_and_free_after_any_end(runs):
    def look(run: Run, folder: Path) -> None:
        with pytest.raises(InfopruneError, match="another run is at work here"):
            Runs(run.folder)(table(stage("other")), "other")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        runs(table(stage("data"), stage("left", "data", make=look)), "left")
    assert made(runs(last="data")) <= {"data"}


def test_a_lock_file_left_by_a_killed_run_is_no_lock(runs):
    runs.folder.mkdir()
    (runs.folder / ".lock").touch()
    assert made(runs(last="data")) == {"data"}


@pytest.mark.parametrize("code", [13, 30])
def test_a_folder_in_which_no_lock_can_be_made_is_not_writable(runs, monkeypatch, code):
    import os

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(runs.folder / ".lock"))

    runs.folder.mkdir()
    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(InfopruneError) as caught:
        runs()
    assert str(runs.folder) in str(caught.value)
    assert "not writable" in str(caught.value)


# ── Resumable stages ─────────────────────────────────────────────────────────


class Epochs:
    """A stage of four epochs that is interrupted in one of them and continues there."""

    def __init__(self) -> None:
        self.interrupt_in: int | None = None
        self.computed: list[int] = []

    def make(self, run: Run, folder: Path) -> None:
        state = folder / "state.json"
        history = json.loads(state.read_text()) if state.is_file() else []
        for epoch in range(len(history), 4):
            if epoch == self.interrupt_in:
                raise KeyboardInterrupt
            self.computed.append(epoch)
            history.append([epoch, run.recipe.seed])
            state.write_text(json.dumps(history))
        state.unlink()
        (folder / "out.json").write_text(json.dumps(history))

    def stages(self) -> dict[str, Stage]:
        trained = Stage("gates", "trained", (), lambda r: {"seed": r.seed}, self.make, resumable=True, uses_model=False)
        return table(trained, stage("end", "gates"))


def test_an_interrupted_stage_continues_where_it_was(runs):
    epochs = Epochs()
    stages = {**DIAMOND, **epochs.stages()}
    runs(stages, "data")
    epochs.interrupt_in = 2
    with pytest.raises(KeyboardInterrupt):
        runs(stages)
    assert not runs["gates"].exists()
    epochs.interrupt_in = None
    assert made(runs(stages)) == {"gates", "end"}
    assert epochs.computed == [0, 1, 2, 3]
    uninterrupted = Runs(runs.folder.with_name("whole"))
    uninterrupted(stages)
    for file in ("out.json", MANIFEST):
        assert (runs["gates"] / file).read_bytes() == (uninterrupted["gates"] / file).read_bytes()
    assert sorted(p.name for p in runs["gates"].iterdir()) == [MANIFEST, "out.json"]


def test_what_was_begun_for_another_recipe_is_forgotten(runs):
    epochs = Epochs()
    stages = {**DIAMOND, **epochs.stages()}
    runs(stages, "data")
    epochs.interrupt_in = 2
    with pytest.raises(KeyboardInterrupt):
        runs(stages)
    epochs.interrupt_in = None
    runs(stages, recipe={"seed": 5})
    assert epochs.computed == [0, 1, 0, 1, 2, 3]
    assert json.loads((runs["gates"] / "out.json").read_text()) == [[e, 5] for e in range(4)]


def test_leftovers_of_unknown_origin_are_forgotten(runs):
    epochs = Epochs()
    staging = runs.folder / ".gates.partial"
    (staging / "deep").mkdir(parents=True)
    (staging / "deep" / "x").touch()
    (staging / "state.json").write_text("[[0, 99]]")
    runs(epochs.stages())
    assert epochs.computed == [0, 1, 2, 3]
    assert not staging.exists()
    assert sorted(p.name for p in runs["gates"].iterdir()) == [MANIFEST, "out.json"]
