"""Who makes what in a sweep: shared stages by one point only, whoever waits goes after, and one that fails alone."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from infoprune_export.pipeline import order
from infoprune_export.recipe import Point, load_recipe, points_of
from infoprune_export.stages import STAGES
from infoprune_export.validate.study_work import LAST, Job, _signatures, follow, plan, whole

GRIDS = {
    "late": ["export.quantization=none,int8", "validate.onnx_tolerance=0.1,0.2"],
    "nested": ["heads.remove=0.25,0.5", "ffn.keep_macs=0.5,0.25", "export.precision=fp32,fp16"],
    "early": ["data.calibration_images=8,16", "ffn.keep_macs=0.5,0.25"],
    "same": ["bench.rounds=3,4,5"],
    "one": ["heads.remove=0.5"],
}


def points_with(name: str) -> list[Point]:
    return points_of(load_recipe("quickstart", ["variants={}", "budget.by=none"], GRIDS[name]))


class Workshop:
    """Carries jobs out in threads as the pipeline would: what is there already is taken, the rest takes a while."""

    def __init__(self, points: list[Point], seed: int) -> None:
        self.signatures = [_signatures(point) for point in points]
        self.lock, self.random = threading.Lock(), random.Random(seed)
        self.pool = ThreadPoolExecutor(16)
        self.making: set[str] = set()
        self.made: set[str] = set()
        self.most = self.now = 0
        self.twice: list[str] = []

    def submit(self, job: Job) -> Future[str | None]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        return self.pool.submit(self._carry_out, job)

    def _carry_out(self, job: Job) -> None:
        stages = {need for stage in job.stages for need in order(STAGES, stage)}
        with self.lock:
            mine = {self.signatures[job.point][stage] for stage in stages} - self.made
            self.twice += mine & self.making
            self.making |= mine
            pause = self.random.random() / 300
        time.sleep(pause)
        with self.lock:
            self.making -= mine
            self.made |= mine
            self.now -= 1


@pytest.mark.parametrize("capacity", [1, 2, 16])
@pytest.mark.parametrize("name", GRIDS)
def test_a_stage_is_made_once_however_many_work(name, capacity):
    points = points_with(name)
    shop, finished = Workshop(points, seed=capacity), []
    with shop.pool:
        assert follow(plan(points), shop.submit, capacity, finished.append) == {}
    assert shop.twice == []
    assert shop.made == {mine[stage] for mine in shop.signatures for stage in order(STAGES, LAST)}
    assert sum(finished) == len(points)
    assert shop.most <= capacity


def test_points_that_share_nothing_do_not_wait_and_those_that_share_wait_for_that_alone():
    points = points_with("early")  # two sets of data, each with two widths
    jobs = plan(points)
    first = [job for job in jobs if not job.needs]
    assert [points[job.point].settings["data.calibration_images"] for job in first] == [8, 16]
    follower = next(job for job in jobs if job.point == 1)
    leader = jobs[next(iter(follower.needs))]
    assert (leader.point, leader.last) == (0, False)
    assert "heads" in leader.stages
    assert "ffn" not in {need for stage in leader.stages for need in order(STAGES, stage)}


def test_points_are_cut_only_where_others_wait():
    jobs = plan(points_with("nested"))
    # Both heads, for each a second width, for each a second precision: cut at gates, at heads, at the checkpoint.
    assert [sum(job.point == place for job in jobs) for place in range(8)] == [4, 1, 2, 1, 3, 1, 2, 1]
    assert len(plan(points_with("one"))) == 1


def test_whoever_works_alone_makes_points_one_after_another():
    assert [(job.point, job.stages) for job in whole(points_with("late"))] == [(n, (LAST,)) for n in range(4)]


def test_a_point_that_fails_is_named_and_the_others_go_on():
    points = points_with("late")
    jobs, asked, finished = plan(points), [], []

    def submit(job: Job) -> Future[str | None]:
        asked.append(job.point)
        future: Future[str | None] = Future()
        future.set_result("no room" if job.point == 0 else None)
        return future

    assert follow(jobs, submit, 2, finished.append) == {0: "no room"}
    assert asked.count(0) == 1, "what is left of a refused point is not tried"
    assert {1, 2, 3} <= set(asked)
    assert sum(finished) == 4


def test_what_is_no_mistake_of_the_user_ends_the_sweep():
    def submit(job: Job) -> Future[str | None]:
        future: Future[str | None] = Future()
        future.set_exception(ZeroDivisionError())
        return future

    with pytest.raises(ZeroDivisionError):
        follow(whole(points_with("late")), submit, 2, lambda count: None)
