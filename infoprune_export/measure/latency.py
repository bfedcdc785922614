"""Paired latency: alternatives take turns in one process, so that drift of the machine hits all of them alike.

A *round* calls every alternative once. Rounds come in blocks of four: a random order, its reverse twice, and that order
again. Over a block nobody is first more often, and of two alternatives each follows itself once, when it finds its
weights in the caches and is some percent faster; and no order repeats itself in step with something periodic.

What is timed may be opened anew for every block, because where its memory comes to lie is luck that lasts as long as it
is open: of two sessions of one ONNX graph on a CPU, the one opened first is 0.7 to 2% slower. Every second block is the
mirror of the one before: opened in the reverse order, and called in reverse orders. Of two rounds at the same place of
such blocks, each favours whom the other puts at a disadvantage.

Rounds go on in batches until the intervals of the ratios are narrow, or a limit is reached; batches grow by half,
because each look at an interval is another chance to stop on a lucky one.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from infoprune_export.measure.results import Stopped
from infoprune_export.measure.statistics import BLOCK, paired_ratio, relative_width

Floats = NDArray[np.float64]
Calls = Mapping[str, Callable[[], object]]
Opener = Callable[[Sequence[str]], Calls]
"""Opens what is timed in the order of the names, once what it opened before is closed, and returns calls that are warm.
It may leave open what costs too much to open; its order then says nothing."""
Clock = Callable[[Callable[[], object]], float]
"""Runs a call to its end and says how many milliseconds it took."""


def kept_open(calls: Calls) -> Opener:
    """Of calls that are ready and stay so."""
    return lambda order: calls


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
    return in_rounds(list(calls), kept_open(calls), rounds=rounds, warmup=warmup, on_round=on_round, clock=clock)


def in_rounds(
    names: Sequence[str],
    open_calls: Opener,
    *,
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] = lambda index: None,
    clock: Clock = wall_clock,
) -> dict[str, Floats]:
    """Milliseconds of `names` in every round, [rounds] each, of what `open_calls` opens anew for every block."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for index, taken in islice(_rounds(names, open_calls, warmup, clock), warmup + rounds):
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
    names: Sequence[str],
    reference: str,
    open_calls: Opener,
    limits: Limits,
    *,
    on_round: Callable[[int], None] = lambda index: None,
    clock: Clock = wall_clock,
) -> Timing:
    """Rounds until the ratio of `reference` to every other of `names` is known to `limits.max_interval`.

    ``stopped`` says whether it is, and which limit was reached if not.
    """
    times: dict[str, list[float]] = {name: [] for name in names}

    def narrow() -> bool:
        first = np.array(times[reference])
        others = (np.array(values) for name, values in times.items() if name != reference)
        return all(relative_width(paired_ratio(first, other)) <= limits.max_interval for other in others)

    look, began = limits.rounds, time.monotonic()
    stopped: Stopped = "rounds"
    for index, taken in _rounds(names, open_calls, limits.warmup, clock):
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
        look = min(limits.max_rounds, math.ceil(done * 1.5 / (2 * BLOCK)) * 2 * BLOCK)
    return Timing({name: np.array(values) for name, values in times.items()}, stopped)


def _rounds(
    names: Sequence[str], open_calls: Opener, warmup: int, clock: Clock
) -> Iterator[tuple[int, dict[str, float]]]:
    """Rounds without end, from ``-warmup`` on."""
    rng = np.random.default_rng(0)
    opening: list[str] = []
    order: list[str] = []
    calls: Calls = {}
    for block in count():
        if block % 2:
            opening, order = opening[::-1], order[::-1]
        else:
            opening, order = rng.permutation(names).tolist(), rng.permutation(names).tolist()
        # Nothing here may keep open what is to be closed.
        calls = {}
        calls = open_calls(opening)
        first = block * BLOCK
        for index in range(first if block else -warmup, first + BLOCK):
            yield index, _round(calls, order if index % BLOCK in (0, BLOCK - 1) else order[::-1], clock)


def _round(calls: Calls, order: Sequence[str], clock: Clock) -> dict[str, float]:
    """Milliseconds of every call; what Python's garbage collector would do meanwhile waits."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return {name: clock(calls[name]) for name in order}
    finally:
        if collecting:
            gc.enable()
