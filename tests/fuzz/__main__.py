"""Fuzz all readers, or one: ``python -m tests.fuzz --inputs 1000000 --seed 1``."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import click

from .reading import READERS
from .running import Crash, Outcome, died, fuzz, write_regression

REGRESSIONS = Path(__file__).parent / "regressions"
_AT_ONCE = 2000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=sorted(READERS), action="append")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="Write the counts, and every wording of a refusal, to this file.")
    parser.add_argument("--regressions", type=Path, default=REGRESSIONS, help="Where crashes are written, minimised.")
    given = parser.parse_args()
    started = time.perf_counter()
    results = {name: Outcome(name) for name in given.reader or READERS}
    pieces = list(_pieces(list(results), given.inputs, given.seed))
    with tempfile.TemporaryDirectory() as scratch:
        deaths = _fuzz_all(pieces, given.processes, Path(scratch), results)
    _print(results, time.perf_counter() - started)
    if given.json is not None:
        given.json.write_text(json.dumps(_plain(results, given, time.perf_counter() - started), indent=1) + "\n")
    crashes = [*deaths, *(kept[0] for result in results.values() for kept in result.crashes.values())]
    for crash in crashes:
        click.echo(f"\n{crash.reader}: {crash.what}\n{crash.detail[-2000:]}", err=True)
        click.echo(f"written: {write_regression(crash, given.regressions)}", err=True)
    # Fewer than asked for: a process died, even where none of its inputs is to blame.
    return 1 if crashes or sum(result.inputs for result in results.values()) < given.inputs else 0


def _fuzz_all(
    pieces: list[tuple[str, int, range]], processes: int, scratch: Path, results: dict[str, Outcome]
) -> list[Crash]:
    """Add every piece to its reader's outcome; the inputs on which processes died, if any did, end it early."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {
            pool.submit(fuzz, name, seed, numbers, scratch / str(place)): place
            for place, (name, seed, numbers) in enumerate(pieces)
        }
        broken = False
        for future in as_completed(futures):
            try:
                piece = future.result()
            except BrokenProcessPool:
                broken = True
                continue
            results[piece.reader].add(piece)
            (scratch / str(futures[future])).unlink()
    left = sorted(scratch.iterdir()) if broken else []
    suspects = (died(*pieces[int(path.name)][:2], path) for path in left)
    return [crash for crash in suspects if crash is not None]


def _pieces(names: list[str], inputs: int, seed: int) -> Iterator[tuple[str, int, range]]:
    """Every reader's share, in pieces for the processes."""
    shares = [READERS[name].share for name in names]
    counts = [int(inputs * share / sum(shares)) for share in shares]
    counts[0] += inputs - sum(counts)
    for name, count in zip(names, counts, strict=True):
        for first in range(0, count, _AT_ONCE):
            yield name, seed, range(first, min(count, first + _AT_ONCE))


def _print(results: dict[str, Outcome], seconds: float) -> None:
    columns = ("reader", "inputs", "taken", "refused", "crashed", "wordings", "inputs/s", "slowest s")
    click.echo(("{:<18}" + "{:>10}" * 7).format(*columns))
    for name, result in results.items():
        rate = result.inputs / result.seconds if result.seconds else 0.0
        numbers = (result.inputs, result.taken, result.refused, result.crashed, len(result.messages))
        click.echo(("{:<18}" + "{:>10}" * 5 + "{:>10.0f}{:>10.3f}").format(name, *numbers, rate, result.slowest))
    total = Outcome("all")
    for result in results.values():
        total.add(result)
    numbers = (total.inputs, total.taken, total.refused, total.crashed, len(total.messages))
    click.echo(
        ("{:<18}" + "{:>10}" * 5 + "{:>10.0f}{:>10.3f}").format("all", *numbers, total.inputs / seconds, total.slowest)
    )


def _plain(results: dict[str, Outcome], given: argparse.Namespace, seconds: float) -> dict[str, object]:
    readers = {
        name: {
            "inputs": result.inputs,
            "taken": result.taken,
            "refused": result.refused,
            "crashed": result.crashed,
            "slowest_seconds": round(result.slowest, 4),
            "wordings": dict(result.messages.most_common()),
        }
        for name, result in results.items()
    }
    return {"seed": given.seed, "processes": given.processes, "seconds": round(seconds, 1), "readers": readers}


if __name__ == "__main__":
    sys.exit(main())
