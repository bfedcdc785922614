"""Artefact folders are whole or absent, and a damaged one is named."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.artifacts import (
    MANIFEST,
    SCHEMA_VERSION,
    canonical_json,
    fingerprint,
    library_versions,
    make_folder,
    read_manifest,
    sha256_file,
    sha256_json,
    staged,
    verify,
    write_manifest,
    write_text,
    writing,
)
from infoprune_export.errors import InfopruneError


def everything_in(folder: Path) -> dict[str, bytes]:
    """Content of every file by relative name, hidden ones included; empty folders as b''."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
        if p.is_file() or not any(p.iterdir())
    }


@pytest.fixture
def finished(tmp_path) -> Path:
    """A folder with three files and a manifest."""
    folder = tmp_path / "stage"
    with staged(folder) as staging:
        (staging / "weights.bin").write_bytes(b"\x00\x01\x02")
        (staging / "plan.json").write_text("{}\n")
        (staging / "deep" / "er").mkdir(parents=True)
        (staging / "deep" / "er" / "page.txt").write_text("text")
        write_manifest(staging, stage="stage", key="k" * 64, inputs={"up": "abc"}, recipe={"seed": 1})
    return folder


# ── staged ───────────────────────────────────────────────────────────────────


def test_the_folder_appears_only_when_the_block_is_through(tmp_path):
    folder = tmp_path / "stage"
    with staged(folder) as staging:
        (staging / "a").write_text("1")
        assert not folder.exists()
        assert staging.parent == folder.parent
        assert staging.name.startswith(".")
    assert everything_in(tmp_path) == {"stage/a": b"1"}


def test_parents_are_made(tmp_path):
    with staged(tmp_path / "a" / "b" / "c") as staging:
        (staging / "x").touch()
    assert (tmp_path / "a" / "b" / "c" / "x").is_file()


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), InfopruneError("x"), SystemExit(1)])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), staged(tmp_path / "stage") as staging:  # noqa: PT012
        (staging / "half").write_text("1")
        raise error
    assert everything_in(tmp_path) == {}


def test_an_error_leaves_the_finished_folder_as_it_was(tmp_path):
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(RuntimeError), staged(folder) as staging:  # noqa: PT012
        (staging / "new").write_text("new")
        raise RuntimeError
    assert everything_in(tmp_path) == {"stage/old": b"old"}


def test_a_finished_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "stage"
    for name in ("old", "new"):
        with staged(folder) as staging:
            (staging / name).write_text(name)
    assert everything_in(tmp_path) == {"stage/new": b"new"}


def test_what_a_killed_run_staged_is_not_taken_over(tmp_path):
    leftover = tmp_path / ".stage.partial"
    leftover.mkdir()
    (leftover / "half").write_text("1")
    with staged(tmp_path / "stage") as staging:
        assert list(staging.iterdir()) == []
    assert everything_in(tmp_path) == {"stage": b""}


def test_kept_staging_survives_an_error_and_comes_back(tmp_path):
    folder = tmp_path / "stage"
    with pytest.raises(RuntimeError), staged(folder, keep=True) as staging:  # noqa: PT012
        (staging / "state").write_text("1")
        raise RuntimeError
    assert not folder.exists()
    with staged(folder, keep=True) as staging:
        assert (staging / "state").read_text() == "1"
        (staging / "done").write_text("2")
    assert everything_in(tmp_path) == {"stage/state": b"1", "stage/done": b"2"}


def test_a_replacement_cut_between_its_two_renames_leaves_no_trace_behind_the_next(tmp_path, monkeypatch):
    """The one moment at which neither the old nor the new folder has the name."""
    folder = tmp_path / "stage"
    with staged(folder) as staging:
        (staging / "old").touch()
    # what a SIGKILL there leaves
    folder.rename(tmp_path / ".stage.retired")
    (tmp_path / ".stage.partial").mkdir()
    with staged(folder) as staging:
        (staging / "new").touch()
    assert everything_in(tmp_path) == {"stage/new": b""}


def test_a_replacement_that_fails_at_its_second_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename = Path.rename

    def fail_for_staging(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_staging)
    with pytest.raises(InfopruneError, match="disk is full"), staged(folder) as staging:
        (staging / "new").touch()
    assert everything_in(tmp_path) == {"stage/old": b"old"}


# ── Full and read-only disks ─────────────────────────────────────────────────

DISK = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk is full; free some space",
    errno.EACCES: "not writable (Permission denied); choose another folder",
    errno.EPERM: "not writable (Operation not permitted); choose another folder",
    errno.EROFS: "not writable (Read-only file system); choose another folder",
}


def breaking(monkeypatch, owner: type, name: str, code: int, *, half: bytes = b"") -> None:
    """Make a method fail like a broken disk, after having written `half`."""

    def fail(self, *args, **kwargs):
        if half:
            Path(self).write_bytes(half)
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("code", DISK)
def test_a_disk_error_in_a_stage_is_one_line_that_names_the_folder(tmp_path, monkeypatch, code):
    folder = tmp_path / "stage"
    breaking(monkeypatch, Path, "write_text", code, half=b"ha")
    with pytest.raises(InfopruneError) as caught, staged(folder) as staging:
        (staging / "answers.json").write_text("half")
    assert str(caught.value).startswith(f"{folder}: {DISK[code]}")
    assert "\n" not in str(caught.value)
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("code", DISK)
def test_a_disk_error_when_a_folder_is_made_names_it(tmp_path, monkeypatch, code):
    breaking(monkeypatch, Path, "mkdir", code)
    for attempt in (lambda: make_folder(tmp_path / "run"), lambda: staged(tmp_path / "run").__enter__()):
        with pytest.raises(InfopruneError) as caught:
            attempt()
        assert "run" in str(caught.value)
        assert DISK[code] in str(caught.value)
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("keep", [False, True])
def test_a_disk_error_at_the_rename_leaves_no_folder(tmp_path, monkeypatch, keep):
    breaking(monkeypatch, Path, "rename", errno.ENOSPC)
    with pytest.raises(InfopruneError, match="disk is full"), staged(tmp_path / "stage", keep=keep) as staging:
        (staging / "x").touch()
    assert everything_in(tmp_path) == ({".stage.partial/x": b""} if keep else {})


def test_a_disk_error_in_the_manifest_leaves_no_folder(tmp_path, monkeypatch):
    breaking(monkeypatch, Path, "write_text", errno.ENOSPC, half=b"{")
    with pytest.raises(InfopruneError, match="disk is full"), staged(tmp_path / "stage") as staging:  # noqa: PT012
        (staging / "x").touch()
        write_manifest(staging, stage="s", key="k", inputs={}, recipe={})
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("code", DISK)
def test_write_text_keeps_the_old_content_and_nothing_half_written(tmp_path, monkeypatch, code):
    path = tmp_path / "recipe.json"
    write_text(path, "old")
    breaking(monkeypatch, Path, "write_text", code, half=b"ha")
    with pytest.raises(InfopruneError) as caught:
        write_text(path, "new")
    assert str(caught.value).startswith(f"{path}: {DISK[code]}")
    assert everything_in(tmp_path) == {"recipe.json": b"old"}


def test_write_text_replaces(tmp_path):
    path = tmp_path / "recipe.json"
    for text in ("one", "two", "mit Umlaut ä"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert everything_in(tmp_path) == {"recipe.json": "mit Umlaut ä".encode()}


def test_other_errors_of_the_system_are_defects_and_pass(tmp_path):
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "none").read_text()
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        1 / 0  # noqa: B018


def test_tensors_that_do_not_fit_on_the_disk_are_one_line_too(tmp_path, monkeypatch):
    """safetensors writes in Rust and raises no OSError; this is what it says on a real full disk."""
    from safetensors import SafetensorError

    with pytest.raises(InfopruneError, match="disk is full"), staged(tmp_path / "stage"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert everything_in(tmp_path) == {}


def test_arrays_that_do_not_fit_on_the_disk_are_one_line_too(tmp_path):
    """NumPy's tofile, by which ONNX weights are written, raises an OSError without a number."""
    with pytest.raises(InfopruneError, match="stage: ") as caught, staged(tmp_path / "stage"):
        raise OSError("problem writing element 61440 to file")
    assert "\n" not in str(caught.value)
    assert everything_in(tmp_path) == {}


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_device_that_is_really_full(tmp_path):
    with pytest.raises(InfopruneError, match="the disk is full"), writing(tmp_path):
        Path("/dev/full").write_bytes(b"x" * 100_000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InfopruneError, match="not writable"):
            make_folder(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("below", ["file", "x" * 300])
def test_a_folder_that_cannot_be_is_named(tmp_path, below):
    (tmp_path / "file").touch()
    target = tmp_path / below / "run"
    with pytest.raises(InfopruneError) as caught:
        make_folder(target)
    assert str(caught.value).startswith(f"{target}: no folder can be made here")
    assert everything_in(tmp_path) == {"file": b""}


# ── Manifests ────────────────────────────────────────────────────────────────


def test_a_manifest_describes_every_file_of_its_folder(finished):
    manifest = read_manifest(finished)
    assert manifest is not None
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert (manifest["stage"], manifest["key"]) == ("stage", "k" * 64)
    assert manifest["inputs"] == {"up": "abc"}
    assert manifest["recipe"] == {"seed": 1}
    assert manifest["outputs"] == {
        name: sha256_file(finished / name) for name in ("weights.bin", "plan.json", "deep/er/page.txt")
    }
    assert manifest["libraries"] == library_versions()
    assert {"torch", "transformers", "numpy"} <= manifest["libraries"].keys()
    verify(finished, manifest)


def test_a_manifest_has_the_same_bytes_everywhere_and_always(tmp_path):
    """No path, no time, no order of creation."""
    for number, names in enumerate((("a", "b"), ("b", "a"))):
        folder = tmp_path / f"elsewhere{number}" / "stage"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(name)
            os.utime(folder / name, (number * 10_000, number * 10_000))
        write_manifest(folder, stage="s", key="k", inputs={"z": 1, "a": 2}, recipe={"y": 1, "x": 2})
    first, second = ((tmp_path / f"elsewhere{n}" / "stage" / MANIFEST).read_text() for n in (0, 1))
    assert first == second
    assert str(tmp_path) not in first
    assert not re.search(r'"/|[12]\d{3}-\d\d-\d\d|\d\d:\d\d', first)


def test_a_manifest_does_not_list_itself(finished):
    write_manifest(finished, stage="stage", key="other", inputs={}, recipe={})
    manifest = read_manifest(finished)
    assert manifest["key"] == "other"
    assert MANIFEST not in manifest["outputs"]
    verify(finished, manifest)


def test_a_folder_without_manifest_is_not_finished(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "none") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"{}",
        b"\xff\xfe",
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "key": "k"}',
        b'{"schema_version": 1, "outputs": {}}',
        b'{"schema_version": 1, "key": 3, "outputs": {}}',
        b'{"schema_version": 1, "key": "k", "outputs": []}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_refused_by_name(finished, content):
    path = finished / MANIFEST
    path.write_bytes(content)
    with pytest.raises(InfopruneError) as caught:
        read_manifest(finished)
    assert str(caught.value) == f"{path}: corrupt manifest; delete {finished} to make it again"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data())
def test_a_manifest_cut_or_changed_anywhere_is_refused_or_still_one(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("stage")
    (folder / "x").write_text("x")
    write_manifest(folder, stage="s", key="k", inputs={}, recipe={})
    content = (folder / MANIFEST).read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    (folder / MANIFEST).write_bytes(content[:cut] + data.draw(st.binary(max_size=3)))
    message = f"{folder}: intact"
    try:
        verify(folder, read_manifest(folder))
    except InfopruneError as error:
        message = str(error)
    finally:
        shutil.rmtree(folder)
    assert str(folder) in message
    assert "\n" not in message


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1", None])
def test_a_manifest_of_another_schema_is_refused(finished, version):
    path = finished / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    with pytest.raises(InfopruneError) as caught:
        read_manifest(finished)
    assert f"{path}: schema_version {version}, this version reads {SCHEMA_VERSION}" in str(caught.value)


# ── verify ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["weights.bin", "plan.json", "deep/er/page.txt"])
def test_a_missing_file_is_named(finished, name):
    manifest = read_manifest(finished)
    (finished / name).unlink()
    with pytest.raises(InfopruneError) as caught:
        verify(finished, manifest)
    assert str(caught.value).startswith(f"{finished / name}: artefact is missing")


@pytest.mark.parametrize("damage", ["flip", "append", "cut", "empty"])
@pytest.mark.parametrize("name", ["weights.bin", "plan.json", "deep/er/page.txt"])
def test_a_corrupt_file_is_named_with_both_hashes(finished, name, damage):
    manifest = read_manifest(finished)
    path = finished / name
    content = path.read_bytes()
    path.write_bytes(
        {
            "flip": bytes([content[0] ^ 1]) + content[1:],
            "append": content + b"\n",
            "cut": content[:-1],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(InfopruneError) as caught:
        verify(finished, manifest)
    message = str(caught.value)
    assert message.startswith(f"{path}: artefact is corrupt")
    assert sha256_file(path)[:12] in message
    assert manifest["outputs"][name][:12] in message


def test_a_folder_in_a_files_place_is_a_missing_file(finished):
    manifest = read_manifest(finished)
    (finished / "plan.json").unlink()
    (finished / "plan.json").mkdir()
    with pytest.raises(InfopruneError, match=r"plan\.json: artefact is missing"):
        verify(finished, manifest)


# ── Fingerprints ─────────────────────────────────────────────────────────────


def test_fingerprint_is_of_names_and_bytes(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"abc")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert fingerprint(tmp_path) == {"a": abc, "b/c": empty}
    assert list(fingerprint(tmp_path)) == ["a", "b/c"]
    assert fingerprint(tmp_path / "a") == {"a": abc}


def test_canonical_json_has_one_form():
    assert canonical_json({"b": [1, 2.5, None, True], "a": {"d": "ä", "c": ""}}) == (
        '{\n  "a": {\n    "c": "",\n    "d": "ä"\n  },\n  "b": [\n    1,\n    2.5,\n    null,\n    true\n  ]\n}\n'
    )


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), _json, max_size=5))
def test_equal_values_have_equal_bytes(value):
    shuffled = dict(reversed(value.items()))
    assert canonical_json(shuffled) == canonical_json(value)
    assert sha256_json(shuffled) == sha256_json(value)
    assert json.loads(canonical_json(value)) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_is_no_json(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": value})
