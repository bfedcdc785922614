"""Links, and names that lead elsewhere: nothing outside of its folder is read as an artefact, written or removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.progress import Progress

from infoprune_export.artifacts import MANIFEST, canonical_json, read_manifest, sha256_file, staged, verify, write_text
from infoprune_export.cli import main
from infoprune_export.data import testbed
from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import check_model, load
from infoprune_export.pipeline import Run, Stage, execute
from infoprune_export.recipe import ModelSpec, Recipe


def run(folder: Path, seed: int = 0, resumable: bool = False) -> Path:
    def make(run: Run, folder: Path) -> None:
        (folder / "out.txt").write_text(f"made {run.recipe.seed}")

    stage = Stage("heads", "", (), lambda recipe: {"seed": recipe.seed}, make, resumable, uses_model=False)
    recipe = Recipe.model_validate({"name": "t", "seed": seed, "model": {"name_or_path": "x"}})
    return execute(Run(recipe, folder, Progress(disable=True)), {"heads": stage}, "heads")


@pytest.fixture
def victim(tmp_path) -> Path:
    """A folder of somebody else's."""
    folder = tmp_path / "victim"
    (folder / "below").mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    (folder / "below" / "more.txt").write_text("more")
    return folder


def untouched(victim: Path) -> None:
    found = {str(p.relative_to(victim)): p.read_text() for p in victim.rglob("*") if p.is_file()}
    assert found == {"precious.txt": "precious", "below/more.txt": "more"}


# ── Where is written ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("name", [".heads.partial", ".heads.retired"])
@pytest.mark.parametrize("to_file", [False, True])
def test_a_link_in_the_place_of_what_is_staged(tmp_path, victim, name, to_file, resumable):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(victim / "precious.txt" if to_file else victim)
    made = run(folder, resumable=resumable)
    assert (made / "out.txt").read_text() == "made 0"
    assert not made.is_symlink()
    untouched(victim)
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "heads", "recipe.json"]


@pytest.mark.parametrize("name", ["recipe.json", ".recipe.json.partial"])
def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path, victim, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(victim / "precious.txt")
    run(folder)
    untouched(victim)
    assert json.loads((folder / "recipe.json").read_text())["name"] == "t"
    assert not (folder / "recipe.json").is_symlink()


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path, victim):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(victim / "precious.txt")
    with pytest.raises(InfopruneError, match=r"\.lock: is a link to another file; remove it"):
        run(folder)
    untouched(victim)


def test_a_link_in_the_place_of_a_stage(tmp_path, victim):
    """One that leads to no stage is refused; one to a stage on another disk is good, and stays there when replaced."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "heads").symlink_to(victim)
    with pytest.raises(InfopruneError, match="no finished stage"):
        run(folder)
    untouched(victim)
    (folder / "heads").unlink()
    run(folder)
    (folder / "heads").rename(tmp_path / "moved")
    (folder / "heads").symlink_to(tmp_path / "moved")
    assert (run(folder) / "out.txt").read_text() == "made 0"
    assert (run(folder, seed=1) / "out.txt").read_text() == "made 1"
    assert (tmp_path / "moved" / "out.txt").read_text() == "made 0"
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "heads", "recipe.json"]


def test_a_link_that_leads_nowhere_in_the_place_of_a_stage_is_replaced(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "heads").symlink_to(tmp_path / "nowhere")
    assert (run(folder) / "out.txt").read_text() == "made 0"
    assert not (tmp_path / "nowhere").exists()


def test_write_text_does_not_write_through_a_link(tmp_path, victim):
    (tmp_path / ".a.json.partial").symlink_to(victim / "precious.txt")
    write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    untouched(victim)


def test_an_error_in_a_stage_removes_no_more_than_the_stage(tmp_path, victim):
    def fail() -> None:
        with staged(tmp_path / "heads") as staging:
            (staging / "link").symlink_to(victim)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    untouched(victim)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["victim"]


# ── What a manifest names ────────────────────────────────────────────────────

OUTSIDE = ("../victim/precious.txt", "a/../../victim/precious.txt", "link/precious.txt", "file-link", "..", ".", "")


@pytest.fixture
def stage(tmp_path, victim) -> Path:
    folder = run(tmp_path / "run")
    (folder / "link").symlink_to(victim)
    (folder / "file-link").symlink_to(victim / "precious.txt")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


def naming(stage: Path, name: str, digest: str) -> None:
    manifest = json.loads((stage / MANIFEST).read_text())
    manifest["outputs"][name] = digest
    (stage / MANIFEST).write_text(canonical_json(manifest))


@pytest.mark.parametrize(
    "name", [*OUTSIDE, "absolute", "loop", "a\0b", "x" * 300, "图" * 100, "a\nb", "\x1b[31m", "\ud800"]
)
def test_a_manifest_that_names_what_is_not_in_its_folder_is_refused(stage, victim, name):
    path = str(victim / "precious.txt") if name == "absolute" else name
    manifest = json.loads((stage / MANIFEST).read_text())
    manifest["outputs"][path] = sha256_file(victim / "precious.txt")
    (stage / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InfopruneError) as caught:
        run(stage.parent)
    message = str(caught.value)
    assert str(stage) in message
    assert message.isprintable()
    untouched(victim)


def test_a_links_target_inside_of_the_folder_is_a_file_of_it(stage):
    (stage / "inner").symlink_to("out.txt")
    naming(stage, "inner", sha256_file(stage / "out.txt"))
    manifest = read_manifest(stage)
    assert manifest is not None
    verify(stage, manifest)


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": {"out.txt": 3}},
        {"outputs": []},
        {"inputs": None},
        {"recipe": "x"},
        {"key": 3},
        {"schema_version": None},
    ],
)
def test_a_manifest_of_another_form_is_refused(stage, change):
    manifest = json.loads((stage / MANIFEST).read_text())
    (stage / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(InfopruneError, match=MANIFEST):
        run(stage.parent)


# ── What a checkpoint's index names ──────────────────────────────────────────


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tmp_path / "model"
    vlm = load(ModelSpec(name_or_path="testbed/tiny-llava"))
    vlm.model.save_pretrained(folder, max_shard_size="200KB")
    vlm.processor.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def renamed(folder: Path, name: object) -> None:
    """The first shard of the index gets another name."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] = {key: name if value == first else value for key, value in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def test_an_index_that_is_right_loads(sharded):
    load(ModelSpec(name_or_path=str(sharded)))


def test_an_index_that_names_no_file_inside_is_refused(sharded, tmp_path):
    shutil.copy(min(sharded.glob("model-*.safetensors")), tmp_path / "outside.safetensors")
    whole = (sharded / "model.safetensors.index.json").read_text()
    names = [
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "..",
        "a\\b",
        "a\0b",
        "x" * 300,
        "no\nne",
        3,
    ]
    for name in names:
        renamed(sharded, name)
        for read in (check_model, load):
            with pytest.raises(InfopruneError) as caught:
                read(ModelSpec(name_or_path=str(sharded)))
            assert str(sharded) in str(caught.value)
            assert str(caught.value).isprintable()
        (sharded / "model.safetensors.index.json").write_text(whole)


def test_a_shard_that_is_missing_or_damaged_is_named(sharded):
    shard = min(sharded.glob("model-*.safetensors"))
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    damages = {
        "header's length": data[:7] + b"\xff" + data[8:],
        "header": data[:20] + bytes([data[20] ^ 0x80]) + data[21:],
        "offsets": data[:header].replace(b"data_offsets", b"data_offsetz", 1) + data[header:],
        "data cut": data[:-1],
        "data longer": data + b"\0",
    }
    for damaged in damages.values():
        shard.write_bytes(damaged)
        with pytest.raises(InfopruneError) as caught:
            load(ModelSpec(name_or_path=str(sharded)))
        assert str(sharded) in str(caught.value)
        assert str(caught.value).isprintable()
    shard.unlink()
    with pytest.raises(InfopruneError, match="is missing"):
        check_model(ModelSpec(name_or_path=str(sharded)))


# ── Names in recipes ─────────────────────────────────────────────────────────

HOSTILE = ("../x", "/x", "a/b", "..", ".", "", "a\nb", "a\0b", "\x1b[31m", "a b", "\u202e", "-rf", "x\u2028y", "é")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_recipes_name_and_variants_are_folder_names(tmp_path, name):
    for tree in (
        {"name": name, "model": {"name_or_path": "x"}},
        {"name": "t", "model": {"name_or_path": "x"}, "variants": {name: {}}},
    ):
        (tmp_path / "r.yaml").write_text(json.dumps(tree))
        result = CliRunner().invoke(main, ["run", str(tmp_path / "r.yaml")])
        assert result.exit_code == 2
        message = result.stderr.removesuffix("\n")
        assert message.startswith("error: ")
        assert message.isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_the_models_of_the_testbed_are_those_shipped():
    assert testbed.names()
    with pytest.raises(InfopruneError, match="no testbed model"):
        check_model(ModelSpec(name_or_path="testbed/../../../etc"))
