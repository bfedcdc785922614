"""Runs a recipe stage by stage into one folder, and never does again what is already there.

A stage's folder is reused when its manifest carries the same key: stage, recipe slice, device, library versions, and
the bytes of everything upstream. So a changed recipe reruns what depends on the change, a killed run resumes at the
stage that was cut (gate training even at its epoch), and a damaged file is named instead of used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from infoprune_export.artifacts import (
    MANIFEST,
    canonical_json,
    check_writable,
    clear_leftovers,
    fingerprint,
    library_versions,
    make_folder,
    read_manifest,
    remove,
    sha256_file,
    sha256_json,
    staged,
    verify,
    write_manifest,
    write_text,
    writing,
)
from infoprune_export.errors import InfopruneError, is_out_of_memory, memory_advice
from infoprune_export.recipe import ModelSpec, Recipe, Target, load_target

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from infoprune_export.data.dataset import Split
    from infoprune_export.models.vlm import VLM


@dataclass(frozen=True)
class Stage:
    """One artefact folder: what it needs, what of the recipe it depends on, and how it is made."""

    name: str
    title: str
    needs: tuple[str, ...]
    recipe_slice: Callable[[Recipe], Mapping[str, Any]]
    make: Callable[[Run, Path], None]
    resumable: bool = False
    """The stage keeps state of its own in its folder while it is unfinished."""
    uses_model: bool = True


@dataclass
class Run:
    """A recipe at work in a folder. Stages reach everything they share through it."""

    recipe: Recipe
    folder: Path
    progress: Progress
    donors: tuple[Path, ...] = ()
    """Other runs' folders; stages with equal keys are taken from the first that has them."""
    finished: dict[str, Path] = field(default_factory=dict)

    def folder_of(self, stage: str) -> Path:
        """A finished upstream stage's folder."""
        return self.finished[stage]

    @cached_property
    def device(self) -> str:
        from infoprune_export.device import resolve_device

        return resolve_device(self.recipe.device)

    @cached_property
    def target(self) -> Target:
        return load_target(self.recipe.engine.target)

    @cached_property
    def model_fingerprint(self) -> Mapping[str, str]:
        """sha256 of every file of a local model, or the hub id and revision."""
        from infoprune_export.models.vlm import resolve

        source = resolve(self.recipe.model.name_or_path)
        if isinstance(source, str):
            return {"hub": source, "revision": self.recipe.model.revision or "main"}
        return fingerprint(source)

    @cached_property
    def split(self) -> Split:
        """The recipe's data, read from where the data stage put it or from the user's own files."""
        from infoprune_export.data import dataset

        return dataset.read(self.recipe.data, self.folder_of("data"))

    @cached_property
    def original(self) -> VLM:
        """The unchanged model. Stages must leave it so."""
        return load_vlm(self.recipe.model, self.device)

    @cached_property
    def original_on_cpu(self) -> VLM:
        """The unchanged model where export and parity look at it."""
        return self.original if self.device == "cpu" else load_vlm(self.recipe.model, "cpu")

    def track(self, title: str, total: int) -> Callable[[int], None]:
        """A progress line below the stage's; the returned function advances it."""
        from infoprune_export.console import tracker

        return tracker(self.progress)(f"  {title}", total)


def load_vlm(spec: ModelSpec, device: str, dtype: torch.dtype | None = None) -> VLM:
    """`models.vlm.load`, which with `rewrite.checkpoint` imported reads pruned checkpoints too; fp32 by default."""
    import torch

    import infoprune_export.rewrite.checkpoint  # noqa: F401
    from infoprune_export.models.vlm import load

    return load(spec, device, dtype or torch.float32)


def execute(run: Run, stages: Mapping[str, Stage], last: str, *, force: bool = False) -> Path:
    """Bring the run up to date through stage `last`, whose folder is returned.

    With ``force`` the last stage is made again even if it is up to date.

    Raises:
        InfopruneError: see the stages; also a damaged artefact, an unwritable folder, another run in the same folder.
    """
    created = not os.path.lexists(run.folder)
    make_folder(run.folder)
    check_writable(run.folder)
    lock = FileLock(run.folder / ".lock")
    if (run.folder / ".lock").is_symlink():
        # Locking truncates what it opens.
        raise InfopruneError(f"{run.folder / '.lock'}: is a link to another file; remove it")
    try:
        with writing(run.folder):
            lock.acquire(timeout=0)
    except Timeout:
        raise InfopruneError(
            f"{run.folder}: another run is at work here; wait for it or choose another --output"
        ) from None
    try:
        write_text(run.folder / "recipe.json", canonical_json(run.recipe.to_dict()))
        for name in order(stages, last):
            run.finished[name] = _bring_up_to_date(run, stages[name], force=force and name == last)
    except BaseException:
        if created and not run.finished:
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    finally:
        lock.release()
    return run.finished[last]


def order(stages: Mapping[str, Stage], last: str) -> list[str]:
    """`last` and everything it needs, upstream first."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        for need in stages[name].needs:
            visit(need)
        if name not in ordered:
            ordered.append(name)

    visit(last)
    return ordered


def _bring_up_to_date(run: Run, stage: Stage, *, force: bool) -> Path:
    folder = run.folder / stage.name
    key, inputs, recipe = _key(run, stage)
    manifest = read_manifest(folder)
    if manifest is None and folder.exists():
        raise InfopruneError(
            f"{folder}: exists but is no finished stage (no {MANIFEST}); move it away or choose another --output"
        )
    if manifest is not None and manifest["key"] == key and not force:
        verify(folder, manifest)
        # A kill while other settings were tried, since taken back.
        clear_leftovers(folder, keep=stage.resumable)
        run.progress.console.print(f"[dim]{stage.name:<11} up to date[/dim]")
        return folder
    if not force and any(_take_from_donor(donor / stage.name, folder, key) for donor in run.donors):
        run.progress.console.print(f"[dim]{stage.name:<11} shared[/dim]")
        return folder
    started = time.monotonic()
    task = run.progress.add_task(stage.title, total=None)
    with staged(folder, keep=stage.resumable) as staging:
        if stage.resumable:
            _forget_other_key(staging, key)
        with _naming(stage):
            stage.make(run, staging)
        (staging / _KEY_FILE).unlink(missing_ok=True)
        write_manifest(staging, stage=stage.name, key=key, inputs=inputs, recipe=recipe)
    run.progress.remove_task(task)
    run.progress.console.print(f"{stage.name:<11} {stage.title} [dim]{time.monotonic() - started:.1f} s[/dim]")
    return folder


@contextlib.contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Say in which stage memory ran out, in one line; other errors pass."""
    try:
        yield
    except InfopruneError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InfopruneError(
            f"{stage.name}: out of memory; {memory_advice(error)}, and run the same command again to resume"
        ) from error


def _key(run: Run, stage: Stage) -> tuple[str, dict[str, Any], dict[str, Any]]:
    inputs: dict[str, Any] = {name: sha256_file(run.finished[name] / MANIFEST) for name in stage.needs}
    if stage.uses_model:
        inputs["model"] = dict(run.model_fingerprint)
    recipe = dict(stage.recipe_slice(run.recipe))
    everything = {
        "stage": stage.name,
        "inputs": inputs,
        "recipe": recipe,
        "device": run.device if stage.uses_model else "",
        "libraries": library_versions(),
    }
    return sha256_json(everything), inputs, recipe


_KEY_FILE = "unfinished-key"


def _forget_other_key(staging: Path, key: str) -> None:
    """What an interrupted stage left behind is only worth something to the same work."""
    marker = staging / _KEY_FILE
    if not marker.is_file() or marker.read_text(encoding="utf-8") != key:
        for path in staging.iterdir():
            remove(path)
        write_text(marker, key)


def _take_from_donor(source: Path, folder: Path, key: str) -> bool:
    manifest = read_manifest(source)
    if manifest is None or manifest["key"] != key:
        return False
    verify(source, manifest)
    with staged(folder) as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True, copy_function=_link_or_copy)
    return True


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
