"""Who makes which stages of a sweep's points, and when, so that stages that points share are made once.

Two points share a stage if it and everything upstream of it have the same slices of their recipes. The first point with
such a stage *leads* it: the others wait until it is there and take it from the leader's folder (`pipeline.Run.donors`).
A point's work is cut into *jobs* only where others wait for a part of it, so that a model is loaded a few times a point
and no more. Nothing depends on the order for being right: a job that finds nothing to take makes the stage itself.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from infoprune_export.artifacts import sha256_json
from infoprune_export.errors import InfopruneError
from infoprune_export.pipeline import Run, execute, order
from infoprune_export.recipe import Point, Recipe
from infoprune_export.stages import STAGES, check_everything

LAST = "validation"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """Stages of one point, up to which it is brought."""

    point: int
    stages: tuple[str, ...]
    needs: frozenset[int]
    """Places of the jobs that must be done before, in the list of jobs."""
    last: bool
    """Nothing of the point is left to do after it."""


Submit = Callable[[Job], "Future[str | None]"]
"""Starts a job; its result is a user's mistake in a line, or None."""


# ── Plan ─────────────────────────────────────────────────────────────────────


def plan(points: Sequence[Point]) -> list[Job]:
    """Jobs that bring all points to their validation, in an order in which each only needs earlier ones.

    Raises:
        InfopruneError: what stages read from disk to know what they depend on is not there.
    """
    stages = order(STAGES, LAST)
    signatures = [_signatures(point) for point in points]
    having: dict[str, list[int]] = {}
    for place, mine in enumerate(signatures):
        for name in stages:
            having.setdefault(mine[name], []).append(place)
    jobs: list[Job] = []
    made_by: dict[str, int] = {}  # signature -> the job after which it is there
    for place, mine in enumerate(signatures):
        previous: int | None = None
        for wanted in _cuts(stages, place, mine, having):
            covered = {need for name in wanted for need in order(STAGES, name)}
            needs = {made_by[mine[name]] for name in covered if having[mine[name]][0] != place}
            needs |= set() if previous is None else {previous}
            previous = len(jobs)
            for name in covered:
                made_by.setdefault(mine[name], previous)
            jobs.append(Job(place, wanted, frozenset(needs), last=LAST in wanted))
    return jobs


def whole(points: Sequence[Point]) -> list[Job]:
    """A job for each point, for whoever works alone: one after another, nothing is made twice."""
    return [Job(place, (LAST,), frozenset(), last=True) for place in range(len(points))]


def _signatures(point: Point) -> dict[str, str]:
    """What a stage and everything upstream of it depend on, of the recipe."""
    found: dict[str, str] = {}
    for name in order(STAGES, LAST):
        stage = STAGES[name]
        try:
            slices = dict(stage.recipe_slice(point.recipe))
        except InfopruneError as error:
            raise InfopruneError(f"point {point.name}: {error}") from None
        found[name] = sha256_json([name, slices, [found[need] for need in stage.needs]])
    return found


def _cuts(
    stages: Sequence[str], place: int, mine: Mapping[str, str], having: Mapping[str, list[int]]
) -> Iterator[tuple[str, ...]]:
    """The stages each of a point's jobs ends with: one job for every set of points that waits for some of them."""
    led = [(name, tuple(having[mine[name]])) for name in stages if having[mine[name]][0] == place]
    waiting = [(name, points) for name, points in led if len(points) > 1]
    part: list[str] = []
    for number, (name, points) in enumerate(waiting):
        part.append(name)
        if LAST in part or number + 1 == len(waiting) or waiting[number + 1][1] != points:
            if LAST not in part:
                yield _tips(part)
            part = []
    yield (LAST,)


def _tips(stages: Sequence[str]) -> tuple[str, ...]:
    """Those that bring all others with them."""
    return tuple(name for name in stages if not any(name != other and name in order(STAGES, other) for other in stages))


def follow(jobs: Sequence[Job], submit: Submit, capacity: int, on_point: Callable[[int], None]) -> dict[int, str]:
    """Carry out all jobs, at most `capacity` at a time; points that a user's mistake ended, each with its line.

    What others wait for goes first. The rest of a point that ended is left out; whoever waited for it goes on alone.
    """
    left, done = set(range(len(jobs))), set[int]()
    running: dict[Future[str | None], int] = {}
    refused: dict[int, str] = {}
    while left or running:
        for number in [number for number in left if jobs[number].point in refused]:
            left.remove(number)
            done.add(number)
        ready = sorted((n for n in left if jobs[n].needs <= done), key=lambda n: (jobs[n].last, n))
        for number in ready[: capacity - len(running)]:
            left.remove(number)
            running[submit(jobs[number])] = number
        if not running:
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            number = running.pop(future)
            problem = future.result()
            done.add(number)
            if problem is not None:
                refused[jobs[number].point] = problem
            if problem is not None or jobs[number].last:
                on_point(1)
    return refused


# ── Work ─────────────────────────────────────────────────────────────────────


def carry_out(
    recipe: Recipe, stages: Sequence[str], folder: Path, donors: tuple[Path, ...], progress: Progress | None = None
) -> str | None:
    """Bring a point up to its stages; returns a user's mistake in a line."""
    silent = Progress(console=Console(quiet=True), disable=True)
    run = Run(recipe, folder, progress or silent, donors=donors)
    try:
        check_everything(run, timing=True)
        for name in stages:
            execute(run, STAGES, name)
    except InfopruneError as error:
        return str(error)
    return None


@contextmanager
def in_turn(points: Sequence[Point], folders: Sequence[Path], progress: Progress) -> Iterator[Submit]:
    """Jobs are done here, at once."""

    def submit(job: Job) -> Future[str | None]:
        recipe, folder, donors = arguments(job, points, folders)
        progress.console.print(f"[bold]point {points[job.point].name}[/bold]", highlight=False)
        future: Future[str | None] = Future()
        future.set_result(carry_out(recipe, job.stages, folder, donors, progress))
        return future

    yield submit


@contextmanager
def in_processes(points: Sequence[Point], folders: Sequence[Path], workers: int) -> Iterator[Submit]:
    """Jobs are done by processes of this machine, each on one thread.

    Raises:
        InfopruneError: a process was killed, by the system if memory was short.
    """
    import multiprocessing

    others = {process.pid for process in multiprocessing.active_children()}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_alone)
    with _one_thread():

        def submit(job: Job) -> Future[str | None]:
            recipe, folder, donors = arguments(job, points, folders)
            return pool.submit(carry_out, recipe, job.stages, folder, donors)

        try:
            yield submit
            pool.shutdown()
        except BrokenProcessPool:
            raise InfopruneError(
                f"one of {workers} processes was killed, perhaps for want of memory; run the same command again with "
                "fewer --workers: what is finished stays"
            ) from None
        finally:
            for process in multiprocessing.active_children():
                if process.pid not in others:
                    process.terminate()
            pool.shutdown(cancel_futures=True)


def arguments(job: Job, points: Sequence[Point], folders: Sequence[Path]) -> tuple[Recipe, Path, tuple[Path, ...]]:
    """Recipe, folder and donors of a job."""
    donors = tuple(folder for place, folder in enumerate(folders) if place != job.point)
    return points[job.point].recipe, folders[job.point], donors


@contextmanager
def _one_thread() -> Iterator[None]:
    """What new processes read when they load their libraries."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _alone() -> None:
    """A process that works on one thread, says nothing, and ends when the one that started it was killed."""
    import multiprocessing
    import threading
    from multiprocessing.connection import wait as wait_for

    parent = multiprocessing.parent_process()
    assert parent is not None
    ending = functools.partial(_end_after, wait_for, parent.sentinel)
    threading.Thread(target=ending, daemon=True).start()
    prepare_worker()


def _end_after(wait_for: Callable[..., object], sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def prepare_worker() -> None:
    """One thread and no messages of libraries."""
    import torch

    from infoprune_export.console import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
