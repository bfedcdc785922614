"""Paired latency: alternatives take turns in one process, so that drift of the machine hits all of them alike.

A *round* calls every alternative once. Rounds come in blocks of four: a random order, its reverse twice, and that order
again. Over a block nobody is first more often, and of two alternatives each follows itself once, when it finds its
weights in the caches and is some percent faster; and no order repeats itself in step with something periodic. Rounds go
on in batches until the intervals of the ratios are narrow, or a limit is reached; batches grow by half, because each
look at an interval is another chance to stop on a lucky one.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from infoprune_export.measure.results import Stopped
from infoprune_export.measure.statistics import BLOCK, paired_ratio, relative_width

Floats = NDArray[np.float64]
Calls = Mapping[str, Callable[[], object]]
Clock = Callable[[Callable[[], object]], float]
"""Runs a call to its end and says how many milliseconds it took."""


def wall_clock(call: Callable[[], object]) -> float:
    """Of the host. The call must have finished when it returns (synchronise a GPU inside it)."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def cuda_clock(call: Callable[[], object]) -> float:
    """Between two events on the device, which is idle when the first is recorded.

    The call may use streams of its own if it has finished on them when it returns, as ONNX Runtime's IO binding does.
    """
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def interleaved(
    calls: Calls,
    *,
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] = lambda index: None,
    clock: Clock = wall_clock,
) -> dict[str, Floats]:
    """Milliseconds of every call in every round, [rounds] each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index, taken in islice(_rounds(calls, warmup, clock), warmup + rounds):
        if index >= 0:
            for name, value in taken.items():
                times[name].append(value)
        on_round(index)
    return {name: np.array(values) for name, values in times.items()}


@dataclass(frozen=True)
class Limits:
    """When rounds end."""

    rounds: int
    """That are made in any case."""
    max_rounds: int
    max_seconds: float
    """Warm-up is not counted."""
    max_interval: float
    """Relative width of every ratio's 95% interval."""
    warmup: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds [rounds] of every alternative, and why there are no more."""

    times: dict[str, Floats]
    stopped: Stopped

    @property
    def rounds(self) -> int:
        return len(next(iter(self.times.values())))


def until_narrow(
    calls: Calls,
    reference: str,
    limits: Limits,
    *,
    on_round: Callable[[int], None] = lambda index: None,
    clock: Clock = wall_clock,
) -> Timing:
    """Rounds until the ratio of `reference` to every other alternative is known to `limits.max_interval`.

    ``stopped`` says whether it is, and which limit was reached if not.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}

    def narrow() -> bool:
        first = np.array(times[reference])
        return all(
            relative_width(paired_ratio(first, np.array(values))) <= limits.max_interval
            for name, values in times.items()
            if name != reference
        )

    look, began = limits.rounds, time.monotonic()
    stopped: Stopped = "rounds"
    for index, taken in _rounds(calls, limits.warmup, clock):
        if index >= 0:
            for name, value in taken.items():
                times[name].append(value)
        on_round(index)
        done = index + 1
        if done <= 0:
            began = time.monotonic()
            continue
        late = done >= limits.rounds and time.monotonic() - began >= limits.max_seconds
        if done < look and not late:
            continue
        if narrow():
            stopped = "narrow"
            break
        if late or done >= limits.max_rounds:
            stopped = "time" if late else "rounds"
            break
        look = min(limits.max_rounds, math.ceil(done * 1.5 / BLOCK) * BLOCK)
    return Timing({name: np.array(values) for name, values in times.items()}, stopped)


def _rounds(calls: Calls, warmup: int, clock: Clock) -> Iterator[tuple[int, dict[str, float]]]:
    """Rounds without end, from ``-warmup`` on; what Python's garbage collector would do meanwhile waits."""
    rng = np.random.default_rng(0)
    order = list(calls)
    index = -warmup
    while True:
        if index % BLOCK == 0:
            order = rng.permutation(list(calls)).tolist()
        elif index % 2:
            order = order[::-1]
        collecting = gc.isenabled()
        gc.disable()
        try:
            taken = {name: clock(calls[name]) for name in order}
        finally:
            if collecting:
                gc.enable()
        yield index, taken
        index += 1
