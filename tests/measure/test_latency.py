"""Paired latency: order of the calls and statistics on given times; no clock is judged."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from infoprune_export.measure.latency import interleaved, machine, paired_ratio, percentiles


def trace(rounds: int, warmup: int) -> tuple[list[str], list[int], dict[str, np.ndarray]]:
    log: list[str] = []
    seen: list[int] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    times = interleaved(calls, rounds=rounds, warmup=warmup, on_round=seen.append)
    return log, seen, times


def test_interleaved_calls_everyone_once_per_round_in_alternating_order():
    log, _, _ = trace(rounds=3, warmup=0)
    assert "".join(log) == "abc" + "cba" + "abc"


def test_interleaved_warms_up_without_recording():
    log, seen, times = trace(rounds=2, warmup=3)
    assert "".join(log) == "cba" + "abc" + "cba" + "abc" + "cba"
    assert seen == [-3, -2, -1, 0, 1]
    assert list(times) == ["a", "b", "c"]
    assert all(values.shape == (2,) and (values >= 0).all() for values in times.values())


def test_interleaved_gives_each_call_its_own_times_in_milliseconds(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    durations = {"slow": iter([9.0, 0.25, 0.5]), "fast": iter([9.0, 0.125, 0.0625])}
    calls = {name: (lambda name=name: advance(next(durations[name]))) for name in durations}
    times = interleaved(calls, rounds=2, warmup=1)
    np.testing.assert_allclose(times["slow"], [250.0, 500.0])
    np.testing.assert_allclose(times["fast"], [125.0, 62.5])


def test_interleaved_lets_a_call_fail():
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleaved({"a": broken}, rounds=1, warmup=0)


def test_percentiles_of_known_times_are_exact():
    assert percentiles(np.arange(101.0)[::-1]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_paired_ratio_of_constant_ratio_has_no_spread_under_drift():
    fast = np.linspace(1.0, 50.0, 31)
    assert paired_ratio(2 * fast, fast) == pytest.approx({"median": 2.0, "low": 2.0, "high": 2.0})


def test_paired_ratio_pairs_rounds_instead_of_dividing_medians():
    slow, fast = np.array([10.0, 1.0, 30.0]), np.array([5.0, 10.0, 10.0])
    assert paired_ratio(slow, fast)["median"] == 2.0  # the medians' quotient would be 1


def test_paired_ratio_interval_is_that_of_the_median():
    # Order statistics: P(39 < Binomial(100, .5) < 61) = .954
    ratio = paired_ratio(np.random.default_rng(0).permutation(np.arange(1.0, 101.0)), np.ones(100))
    assert ratio["median"] == 50.5
    assert 38 <= ratio["low"] <= 41.8
    assert 59.5 <= ratio["high"] <= 63


def test_paired_ratio_depends_on_its_seed_alone():
    rng = np.random.default_rng(1)
    slow, fast = rng.uniform(1, 2, 24), rng.uniform(1, 2, 24)
    intervals = [paired_ratio(slow, fast, seed=seed) for seed in range(12)]
    assert paired_ratio(slow, fast) == intervals[0]
    assert paired_ratio(slow, fast, seed=3) == intervals[3]
    assert any(interval != intervals[0] for interval in intervals)


def test_paired_ratio_of_unequal_rounds_raises():
    with pytest.raises(ValueError):
        paired_ratio(np.ones(3), np.ones(4))


def test_machine_names_processor_cores_governor_and_system_as_json():
    described = json.loads(json.dumps(machine()))
    assert set(described) == {"processor", "cores", "governor", "system"}
    assert described["cores"] == os.cpu_count()
    assert described["processor"].strip()
    assert described["governor"].strip()
