"""Paired latency: order of the calls, when rounds end, and the clocks; no clock is judged."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import weakref
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from infoprune_export.measure import machine as machines
from infoprune_export.measure.latency import Limits, cuda_clock, interleaved, kept_open, until_narrow
from infoprune_export.measure.machine import machine
from infoprune_export.measure.statistics import paired_ratio, relative_width

LIMITS = Limits(rounds=30, max_rounds=300, max_seconds=1e9, max_interval=0.05, warmup=2)


class FakeClock:
    """Milliseconds that were planned, call by call."""

    def __init__(self, **milliseconds) -> None:
        self.planned = {name: iter(values) for name, values in milliseconds.items()}
        self.log: list[str] = []

    def calls(self):
        return {name: (lambda name=name: self.log.append(name)) for name in self.planned}

    def until_narrow(self, limits: Limits = LIMITS, **options):
        calls = self.calls()
        return until_narrow(list(calls), "a", kept_open(calls), limits, clock=self, **options)

    def __call__(self, call) -> float:
        call()
        return next(self.planned[self.log[-1]])


# ── Rounds ───────────────────────────────────────────────────────────────────


def test_orders_of_a_block_are_a_palindrome_and_the_next_block_is_its_mirror():
    clock = FakeClock(**{name: np.ones(160) for name in "abc"})
    interleaved(clock.calls(), rounds=160, warmup=0, clock=clock)
    rounds = ["".join(clock.log[i : i + 3]) for i in range(0, 480, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    blocks = [rounds[i : i + 4] for i in range(0, 160, 4)]
    assert all(block == [block[0], block[0][::-1], block[0][::-1], block[0]] for block in blocks)
    assert all(mirror[0] == block[0][::-1] for block, mirror in zip(blocks[::2], blocks[1::2], strict=True))
    assert len(set(rounds)) == 6  # orders are drawn, so none keeps step with something periodic
    assert Counter(one[0] for one in rounds)["a"] < 120


def test_of_two_alternatives_each_follows_itself_once_a_block():
    """Whoever was called last finds its weights in the caches; that must favour neither."""
    log: list[str] = []
    interleaved({name: (lambda name=name: log.append(name)) for name in "ab"}, rounds=80, warmup=0)
    for start in range(0, 160, 8):
        block = log[start : start + 8]
        assert sorted(one for one, other in pairwise(block) if one == other) == ["a", "b"]


@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
def test_warm_up_is_called_and_not_recorded(warmup):
    clock, seen = FakeClock(a=range(9), b=range(9)), []
    times = interleaved(clock.calls(), rounds=4, warmup=warmup, clock=clock, on_round=seen.append)
    assert seen == list(range(-warmup, 4))
    np.testing.assert_array_equal(times["a"], np.arange(warmup, warmup + 4))
    assert len(clock.log) == 2 * (warmup + 4)


def test_wall_clock_gives_each_call_its_own_milliseconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    durations = {"slow": iter([9.0, 0.25, 0.5]), "fast": iter([9.0, 0.125, 0.0625])}

    def advance(name: str) -> None:
        now[0] += next(durations[name])

    calls = {name: (lambda name=name: advance(name)) for name in durations}
    times = interleaved(calls, rounds=2, warmup=1)
    np.testing.assert_allclose(times["slow"], [250.0, 500.0])
    np.testing.assert_allclose(times["fast"], [125.0, 62.5])


def test_the_garbage_collector_waits_for_the_end_of_a_round_and_goes_on_after_a_failure():
    states = []
    interleaved({"a": lambda: states.append(gc.isenabled())}, rounds=2, warmup=0)
    assert states == [False, False]
    assert gc.isenabled()

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleaved({"a": broken}, rounds=1, warmup=0)
    assert gc.isenabled()


# ── Until narrow ─────────────────────────────────────────────────────────────


def times_of(noise: float, n: int = 400) -> np.ndarray:
    return np.exp(noise * np.random.default_rng(int(noise * 1e6)).standard_normal(n))


def test_rounds_end_when_the_ratio_is_known():
    clock = FakeClock(a=times_of(0.005), b=times_of(0.006))
    timing = clock.until_narrow()
    assert (timing.stopped, timing.rounds) == ("narrow", 30)


def test_noise_makes_more_rounds_up_to_the_limit():
    clock = FakeClock(a=times_of(0.06), b=times_of(0.07))
    timing = clock.until_narrow()
    assert timing.stopped == "narrow"
    assert 30 < timing.rounds < 300
    clock = FakeClock(a=times_of(0.5), b=times_of(0.6))
    timing = clock.until_narrow()
    assert (timing.stopped, timing.rounds) == ("rounds", 300)


def test_the_noisiest_alternative_decides():
    clock = FakeClock(a=times_of(0.001), b=times_of(0.002), c=times_of(0.5))
    assert clock.until_narrow().stopped == "rounds"


def test_time_ends_rounds_but_not_before_the_least_number(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    limits = Limits(rounds=30, max_rounds=300, max_seconds=40.0, max_interval=0.05, warmup=5)

    def tick(index: int) -> None:
        now[0] += 1000.0 if index < 0 else 1.0  # warm-up is not counted

    clock = FakeClock(a=times_of(0.5), b=times_of(0.6))
    timing = clock.until_narrow(limits, on_round=tick)
    assert (timing.stopped, timing.rounds) == ("time", 40)
    now[0], clock = 0.0, FakeClock(a=times_of(0.5), b=times_of(0.6))
    limits = Limits(rounds=30, max_rounds=300, max_seconds=3.0, max_interval=0.05, warmup=5)
    timing = clock.until_narrow(limits, on_round=tick)
    assert (timing.stopped, timing.rounds) == ("time", 30)


def test_every_block_is_opened_anew_and_every_other_one_in_reverse():
    """Nothing that was open before may be held when the next is opened."""
    log: list[tuple[str, ...]] = []
    alive = weakref.WeakSet()

    class Call:
        def __call__(self) -> None:
            log.append(("call",))

    def open_calls(order):
        assert not alive
        log.append(tuple(order))
        opened = {name: Call() for name in order}
        alive.update(opened.values())
        return opened

    noise = iter(times_of(0.5, 1000))

    def clock(call) -> float:
        call()
        return next(noise)

    limits = Limits(rounds=3, max_rounds=80, max_seconds=1e9, max_interval=0.01, warmup=2)
    timing = until_narrow(list("abc"), "a", open_calls, limits, clock=clock)
    assert timing.rounds == 80
    openings = [one for one in log if one != ("call",)]
    assert len(openings) == 20
    assert all(later == earlier[::-1] for earlier, later in zip(openings[::2], openings[1::2], strict=True))
    assert all(sorted(one) == ["a", "b", "c"] for one in openings)
    assert len(set(openings)) > 2
    assert [len(list(calls)) for is_call, calls in itertools.groupby(log, key=("call",).__eq__) if is_call] == (
        [3 * (2 + 4)] + [3 * 4] * 19
    )


@pytest.mark.parametrize("kind", ["opened first", "called first", "follows itself"])
@pytest.mark.parametrize("longer", [0.02, 0.3])
def test_what_depends_on_the_order_is_not_taken_for_a_difference(kind, longer):
    """Each of these moves no single observation, as both rounds of it are each other's mirror."""
    first: list[str] = []
    called: list[str] = []
    rng = np.random.default_rng(0)

    def open_calls(order):
        first[:] = order[:1]
        return {name: (lambda name=name: name) for name in order}

    def clock(call) -> float:
        name = call()
        called.append(name)
        slow = {
            "opened first": name == first[0],
            "called first": len(called) % 2 == 1,
            "follows itself": len(called) > 1 and called[-2] == name,
        }
        return (1.0 + longer * slow[kind]) * np.exp(0.002 * rng.normal())

    limits = dataclasses.replace(LIMITS, rounds=48, max_interval=0.02, warmup=0)
    timing = until_narrow(list("ab"), "a", open_calls, limits, clock=clock)
    ratio = paired_ratio(timing.times["a"], timing.times["b"])
    assert (timing.stopped, timing.rounds, ratio["observations"]) == ("narrow", 48, 24)
    assert ratio["low"] <= 1 <= ratio["high"]
    assert relative_width(ratio) < 0.005 + 0.3 * longer * (kind == "follows itself")


def test_so_few_rounds_that_no_interval_covers_95_percent_are_never_enough():
    clock = FakeClock(a=np.ones(9), b=np.ones(9))
    limits = Limits(rounds=3, max_rounds=5, max_seconds=1e9, max_interval=0.05, warmup=0)
    assert clock.until_narrow(limits).stopped == "rounds"


# ── Machine ──────────────────────────────────────────────────────────────────


def test_machine_describes_itself_as_json():
    described = json.loads(json.dumps(machine()))
    assert set(described) == {"processor", "cores", "governor", "system", "load", "gpus", "power_mode"}
    assert described["cores"] == os.cpu_count()
    assert described["processor"].strip()
    assert described["governor"].strip()


def test_gpus_and_power_mode_are_what_the_tools_say(tmp_path, monkeypatch):
    for name, lines in (
        ("nvidia-smi", "NVIDIA A, 570.1, P0, 700.00 W, 1980 MHz, 2619 MHz, 1980 MHz, 0x0000000000000000, 31"),
        ("nvpmodel", "NV Power Mode: MAXN\n0"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'X'\n{lines}\nX\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    described = machine()
    assert described["gpus"][0]["name"] == "NVIDIA A"
    assert described["gpus"][0]["clocks.sm"] == "1980 MHz"
    assert described["power_mode"] == "NV Power Mode: MAXN 0"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Field \"x\" is not a valid field to query.'\nexit 2\n")
    assert machine()["gpus"] == []
    assert machines._gpus("a, b\n") == []


@pytest.mark.gpu
def test_cuda_events_time_what_the_device_does():
    import torch

    wide = torch.randn(4096, 4096, device="cuda")
    few, many = (lambda: wide @ wide), (lambda: [wide @ wide for _ in range(40)])
    times = interleaved({"few": few, "many": many}, rounds=10, warmup=3, clock=cuda_clock)
    assert np.median(times["many"]) > 5 * np.median(times["few"])
