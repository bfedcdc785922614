"""Jobs of a sweep as Ray tasks, on several machines that share a folder."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infoprune_export.artifacts import library_versions
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import Point, Recipe
from infoprune_export.validate.study_work import Job, Submit, arguments, carry_out, prepare_worker

LOCAL = "local"


def check_ray() -> None:
    """Refuse to start without Ray.

    Raises:
        InfopruneError: it is not installed.
    """
    _ray()


@contextmanager
def in_ray(
    points: Sequence[Point], folders: Sequence[Path], address: str, workers: int | None
) -> Iterator[tuple[Submit, int]]:
    """A function that starts jobs as tasks of one CPU each, and how many run at a time.

    `address` is a cluster's, ``auto``, or ``local``, which starts one on this machine with so many `workers`, by
    default one for each of its CPUs. Ray's usage statistics are off.

    Raises:
        InfopruneError: no cluster there; a machine of it that does not see the sweep's folder, or has other versions
            of the libraries that results depend on; a task that Ray lost.
    """
    ray = _ray()
    _start(ray, address, workers)
    try:
        top = folders[0].parent.resolve()
        _check_machines(ray, top)
        task = ray.remote(num_cpus=1, max_retries=1)(_carry_out)
        here = Path.cwd()

        def submit(job: Job) -> Future[str | None]:
            recipe, folder, donors = arguments(job, points, [place.resolve() for place in folders])
            future: Future[str | None] = task.remote(recipe, job.stages, folder, donors, here).future()
            return future

        available = max(1, int(ray.available_resources().get("CPU", 1)))
        try:
            yield submit, min(available, workers or available)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError):
                raise
            raise InfopruneError(
                f"Ray lost a task ({type(error).__name__}); run the same command again: what is finished stays"
            ) from error
    finally:
        ray.shutdown()


def _start(ray: Any, address: str, workers: int | None) -> None:
    quiet = {"include_dashboard": False, "num_cpus": workers} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InfopruneError(
            f"--ray {address}: no cluster answers ({reason:.120}); start one with ray start --head, or use --ray local"
        ) from None


def _check_machines(ray: Any, top: Path) -> None:
    """Every machine must find in the sweep's folder what this one puts there, and compute with the same libraries."""
    on_node = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    mark = top / f".shared-{uuid.uuid4().hex}"
    mark.write_text(mark.name, encoding="utf-8")
    try:
        look = ray.remote(num_cpus=0)(_look)
        seen = {}
        for node in ray.nodes():
            if node["Alive"]:
                there = on_node(node["NodeID"], soft=False)
                seen[node["NodeManagerHostname"]] = look.options(scheduling_strategy=there).remote(mark)
        try:
            found = dict(zip(seen, ray.get(list(seen.values())), strict=True))
        except ray.exceptions.RayTaskError as error:
            cause = str(error.cause if error.cause is not None else error).strip().splitlines()[-1]
            raise InfopruneError(
                f"a machine of the cluster cannot run infoprune-export ({cause:.120}); install the same version there"
            ) from None
    finally:
        mark.unlink()
    mine = library_versions()
    for machine, (content, versions) in found.items():
        if content != mark.name:
            raise InfopruneError(
                f"{machine}: does not see {top}; choose an --output in a folder that all machines share, at one path"
            )
        if versions != mine:
            other = sorted({*versions.items()} ^ {*mine.items()})[0][0]
            raise InfopruneError(
                f"{machine}: {other} is {versions.get(other, 'missing')} there and {mine.get(other, 'missing')} here; "
                "install the same versions"
            )


def _ray() -> Any:
    # Read when it is imported, here and, by inheritance, where it starts processes of its own.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InfopruneError("--ray needs Ray: pip install 'infoprune-export[ray]', or use --workers") from None


# ── On the machines ──────────────────────────────────────────────────────────


def _look(mark: Path) -> tuple[str | None, dict[str, str]]:
    try:
        return mark.read_text(encoding="utf-8"), library_versions()
    except OSError:
        return None, library_versions()


def _carry_out(recipe: Recipe, stages: Sequence[str], folder: Path, donors: tuple[Path, ...], here: Path) -> str | None:
    if here.is_dir():
        # What a recipe names by a relative path lies where the command was given.
        os.chdir(here)
    prepare_worker()
    return carry_out(recipe, stages, folder, donors)
