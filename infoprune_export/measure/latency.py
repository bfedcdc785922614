"""Paired latency: alternatives take turns in one process, so that drift of the machine hits all of them alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] = lambda index: None,
) -> dict[str, NDArray[np.float64]]:
    """Wall-clock milliseconds of every call in every round, [rounds] each.

    Each round calls every alternative once; the order is reversed in every other round, so that none is always the one
    that finds the caches warm. Calls must have finished when they return (synchronise a GPU inside the call).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(-warmup, rounds):
        for name in list(calls) if index % 2 == 0 else reversed(list(calls)):
            start = time.perf_counter()
            calls[name]()
            if index >= 0:
                times[name].append((time.perf_counter() - start) * 1000)
        on_round(index)
    return {name: np.array(values) for name, values in times.items()}


def percentiles(times: NDArray[np.float64]) -> dict[str, float]:
    """p50, p90 and p99, in the unit of `times`."""
    return {f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)}


def paired_ratio(slow: NDArray[np.float64], fast: NDArray[np.float64], *, seed: int = 0) -> dict[str, float]:
    """Median of the round-by-round ratios slow / fast, with a 95% bootstrap interval (2,000 resamples of rounds)."""
    ratios = slow / fast
    picks = np.random.default_rng(seed).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def machine() -> dict[str, Any]:
    """What a latency figure depends on and no library version shows."""
    model = platform.processor() or platform.machine()
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "governor": governor.read_text(encoding="utf-8").strip() if governor.is_file() else "not reported",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }
