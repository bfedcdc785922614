"""How much faster the compressed encoder is, how much of that the FLOPs promised, and what else could run it.

Everything that is compared takes turns in one interleaved run per batch size (`measure.latency`). On a CPU our sessions
are opened anew for every block of rounds; peers, some of which take a minute to prepare, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infoprune_export.artifacts import library_versions
from infoprune_export.measure.flops import count_flops
from infoprune_export.measure.latency import Opener, Timing, in_rounds, until_narrow
from infoprune_export.measure.machine import machine
from infoprune_export.measure.memory import reset_peak
from infoprune_export.measure.results import BenchResult, BenchRow, Parity, PeerRow, SelfResult, SelfRow
from infoprune_export.measure.statistics import paired_ratio, percentiles, relative_width
from infoprune_export.models.tower import Planned
from infoprune_export.recipe import BenchSpec
from infoprune_export.validate.bench_case import SIDES, BenchCase, Load, check, reference_features
from infoprune_export.validate.bench_memory import Prepare, memory_of
from infoprune_export.validate.bench_running import Graph, Running, Sessions, clock_of, rounds_of
from infoprune_export.validate.peers import Contender, contenders, title_of

Track = Callable[[str, int], Callable[[int], None]]


def time_sessions(
    graphs: Mapping[str, tuple[Graph, Sequence[Planned]]], spec: BenchSpec, on_round: Callable[[int], None]
) -> dict[str, NDArray[np.float64]]:
    """Interleaved milliseconds of graphs of one device, each over its own calls; see `latency.in_rounds`."""
    sessions = Sessions({name: graph for name, (graph, _) in graphs.items()})
    opener = sessions.opener({name: calls for name, (_, calls) in graphs.items()})
    clock = clock_of(next(iter(graphs.values()))[0].device)
    return in_rounds(list(graphs), opener, rounds=spec.rounds, warmup=spec.warmup, on_round=on_round, clock=clock)


def bench(prepare: Prepare, arguments: tuple[Any, ...], track: Track, case: BenchCase | None = None) -> BenchResult:
    """Time original, compressed and the peers of ``bench.against`` in one interleaved run per batch size.

    `efficiency` is the measured speed-up over the FLOP ratio, both of whole graphs: encoder, selection, projector. All
    sides see the same images, ours in as many calls as their graphs need. Outputs of every side are compared with
    PyTorch's before it is timed where there are peers. ``bench.memory`` adds what every side holds and takes.

    `prepare` makes the case from `arguments`, here unless it is given as `case`, and in the processes that measure
    memory; it must then be a function of a module.

    Raises:
        InfopruneError: the target's provider did not start, or memory cannot be measured here.
    """
    case = case or prepare(*arguments)
    spec = case.spec
    if spec.memory and case.device == "cpu":
        reset_peak()  # refused before anything is timed, where it cannot be measured
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        sessions = Sessions({side: case.graph(side) for side in SIDES})
        sessions.open(SIDES)
        advance = track("peers prepared", len(spec.against)) if spec.against else lambda amount: None
        peers = contenders(case, spec.against, advance)
        rows = [_row(case, sessions, peers, case.load(size), track) for size in spec.batch_sizes]
    finally:
        torch.set_num_threads(threads)
    provider = sessions.provider
    if spec.memory:
        sessions.close()
        for row in rows:
            timed = [peer for peer in row["peers"] if peer["reason"] is None]
            sides = [(None, side) for side in SIDES] + [(peer["peer"], peer["side"]) for peer in timed]
            advance = track("peak memory", len(sides))
            for name, side in sides:
                key = side if name is None else title_of(name, side)
                row["memory"][key] = memory_of(prepare, arguments, name, side, row["batch_size"])
                advance(1)
    return {
        "target": case.target.name,
        "provider": provider,
        "threads": spec.threads,
        "rounds": max(row["rounds"] for row in rows),
        "warmup": spec.warmup,
        "max_interval": spec.max_interval,
        "machine": machine(),
        "libraries": library_versions(),
        "rows": rows,
    }


def _row(case: BenchCase, sessions: Sessions, peers: Sequence[Contender], load: Load, track: Track) -> BenchRow:
    parity, others = _checked(case, sessions, peers, load)
    timing = _timed(
        case,
        [*SIDES, *others],
        sessions.opener(load.calls, {name: one[0].call for name, one in others.items()}),
        f"bench rounds, batch {load.batch_size}",
        track,
    )
    times = timing.times
    flops: dict[str, int] = {
        side: sum(count_flops(case.encoder(side), planned) for planned in load.calls[side]) for side in SIDES
    }
    speedup = paired_ratio(times["original"], times["compressed"])
    flop_ratio = flops["original"] / flops["compressed"]
    return {
        "batch_size": load.batch_size,
        "rounds": timing.rounds,
        "stopped": timing.stopped,
        "milliseconds": {side: percentiles(times[side]) for side in SIDES},
        "speedup": speedup,
        "flops": flops,
        "flop_ratio": flop_ratio,
        "efficiency": speedup["median"] / flop_ratio,
        "parity": parity,
        "peers": [_peer_row(peer, others.get(peer.title), times) for peer in peers],
        "memory": {},
    }


def _checked(
    case: BenchCase, sessions: Sessions, peers: Sequence[Contender], load: Load
) -> tuple[dict[str, Parity], dict[str, tuple[Running, Parity, float]]]:
    """How our sides compare with PyTorch, and the peers that run, if there are any; see `Contender.on`."""
    # Made once, and only if something is compared with it.
    reference = cache(partial(reference_features, case, load))
    parity: dict[str, Parity] = {}
    others: dict[str, tuple[Running, Parity, float]] = {}
    if peers:
        ours = sessions.on(load.calls)
        for side in SIDES:
            ours[side].call()
            parity[side] = check(case, side, load, ours[side], case.limits[side], reference)
        for peer in peers:
            started = peer.on(load, lambda one, ran: check(case, one.side, load, ran, one.limits, reference))
            if started is not None:
                others[peer.title] = started
    return parity, others


def _peer_row(
    peer: Contender, started: tuple[Running, Parity, float] | None, times: Mapping[str, NDArray[np.float64]]
) -> PeerRow:
    row: PeerRow = {
        "peer": peer.name,
        "side": peer.side,
        "version": peer.version,
        "reason": peer.reason,
        "milliseconds": None,
        "speedup": None,
        "parity": None,
        "prepare_seconds": None,
    }
    if started is not None:
        _, row["parity"], row["prepare_seconds"] = started
        row["milliseconds"] = percentiles(times[peer.title])
        row["speedup"] = paired_ratio(times["original"], times[peer.title])
    return row


def _timed(case: BenchCase, names: Sequence[str], open_calls: Opener, title: str, track: Track) -> Timing:
    """Against the first of `names`."""
    limits = rounds_of(case.spec)
    advance = track(title, limits.max_rounds + limits.warmup)
    timing = until_narrow(
        names, names[0], open_calls, limits, on_round=lambda index: advance(1), clock=clock_of(case.device)
    )
    # Most runs are done long before; the line then goes.
    if timing.rounds < limits.max_rounds:
        advance(limits.max_rounds - timing.rounds)
    return timing


# ── The bench against itself ─────────────────────────────────────────────────


def bench_self(case: BenchCase, track: Track) -> SelfResult:
    """Time the original's graph in two sessions against each other: the ratio is 1, whatever the machine does.

    An interval without 1 in it, more often than once in twenty, or one that stays wide, says that this machine cannot
    tell such differences now.
    """
    spec, names = case.spec, ("first", "second")
    sessions = Sessions(dict.fromkeys(names, case.graph("original")))
    rows: list[SelfRow] = []
    for size in spec.batch_sizes:
        opener = sessions.opener(dict.fromkeys(names, case.load(size).calls["original"]))
        timing = _timed(case, names, opener, f"bench against itself, batch {size}", track)
        ratio = paired_ratio(timing.times["first"], timing.times["second"])
        width = relative_width(ratio)
        rows.append(
            {
                "batch_size": size,
                "rounds": timing.rounds,
                "stopped": timing.stopped,
                "milliseconds": {name: percentiles(times) for name, times in timing.times.items()},
                "ratio": ratio,
                "contains_one": ratio["low"] <= 1 <= ratio["high"],
                "relative_width": width if np.isfinite(width) else None,
            }
        )
    return {
        "target": case.target.name,
        "provider": sessions.provider,
        "threads": spec.threads,
        "warmup": spec.warmup,
        "max_interval": spec.max_interval,
        "machine": machine(),
        "libraries": library_versions(),
        "rows": rows,
    }
