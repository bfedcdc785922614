"""Time to first token and peak memory of the whole model, from pixels to the first answer token.

What a user waits for is encoder, projector, selection, prefill and one token together, so that is what is timed; the
unpruned model runs its best kernels too (its own encoder in the same engine, SDPA in the language model). Questions are
whole prompts, the cache starts empty, images are preprocessed beforehand.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from infoprune_export.artifacts import library_versions
from infoprune_export.console import percentile_text, ratio_text, rounds_text
from infoprune_export.errors import InfopruneError
from infoprune_export.measure.latency import kept_open, until_narrow
from infoprune_export.measure.machine import machine
from infoprune_export.measure.memory import peak, reset_peak
from infoprune_export.measure.statistics import paired_ratio, percentiles
from infoprune_export.models.vlm import VLM, Decoding, VisualTokens, answer
from infoprune_export.recipe import BenchSpec
from infoprune_export.validate.bench_running import clock_of, rounds_of

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Side:
    """One way to the first token."""

    see: Callable[[dict[str, Tensor]], VisualTokens]
    """Tower inputs to what the language model sees."""
    decoder: Decoding | None = None


@dataclass(frozen=True)
class Contest:
    """A language model, what may stand in front of and inside it, and what it is asked."""

    vlm: VLM
    sides: Mapping[str, Side]
    """The first is `UNPRUNED`."""
    inputs: Callable[[int], dict[str, Tensor]]
    """Tower inputs of so many images."""
    question: str


Prepare = Callable[..., Contest]


def measure(
    prepare: Prepare,
    arguments: tuple[Any, ...],
    spec: BenchSpec,
    track: Callable[[str, int], Callable[[int], None]],
    *,
    memory: bool = True,
) -> dict[str, Any]:
    """`first_token` of the contest that `prepare` makes, with `peak_memory` as ``peak_bytes`` in its rows.

    Raises:
        InfopruneError: see `peak_memory`; what this system cannot measure is refused before the clock starts.
    """
    torch.set_num_threads(spec.threads)
    contest = prepare(*arguments)
    if memory and contest.vlm.device.type == "cpu":
        reset_peak()
    ahead = len(spec.batch_sizes) * (spec.most_rounds + spec.warmup)
    advance, made = track("first tokens", ahead), 0

    def count(index: int) -> None:
        nonlocal made
        made += 1
        advance(1)

    result = first_token(contest, spec, on_round=count)
    # Most runs are done long before; the line then goes.
    if made < ahead:
        advance(ahead - made)
    del contest
    if memory:
        advance = track("peak memory", len(result["rows"]))
        for row in result["rows"]:
            row["peak_bytes"] = peak_memory(prepare, arguments, row["side"], row["batch_size"])
            advance(1)
    return result


def first_token(
    contest: Contest, spec: BenchSpec, *, on_round: Callable[[int], None] = lambda index: None
) -> dict[str, Any]:
    """One row per batch size and side: milliseconds to the first token and in the encoder (`percentiles`), and of each
    the paired ratio to the unpruned side, all from one interleaved run; visual tokens per image; ``rounds``, and why
    there were no more (``stopped``, see `latency.until_narrow`).
    """
    rows = []
    for batch_size in spec.batch_sizes:
        inputs = contest.inputs(batch_size)
        calls: dict[str, Callable[[], object]] = {}
        for name, side in contest.sides.items():
            calls[name] = partial(_answer, contest, side, inputs)
            calls[f"{name}, encoder"] = partial(_see, contest, side, inputs)
        clock = clock_of(contest.vlm.device.type)
        timing = until_narrow(list(calls), UNPRUNED, kept_open(calls), rounds_of(spec), on_round=on_round, clock=clock)
        times = timing.times
        for name, side in contest.sides.items():
            seen = _see(contest, side, inputs)
            rows.append(
                {
                    "batch_size": batch_size,
                    "side": name,
                    "visual_tokens": float(np.mean([len(features) for features in seen.features])),
                    "milliseconds": percentiles(times[name]),
                    "encoder_milliseconds": percentiles(times[f"{name}, encoder"]),
                    "speedup": paired_ratio(times[UNPRUNED], times[name]),
                    "encoder_speedup": paired_ratio(times[f"{UNPRUNED}, encoder"], times[f"{name}, encoder"]),
                    "rounds": timing.rounds,
                    "stopped": timing.stopped,
                }
            )
    return {"threads": torch.get_num_threads(), "machine": machine(), "libraries": library_versions(), "rows": rows}


def _see(contest: Contest, side: Side, inputs: dict[str, Tensor]) -> VisualTokens:
    with torch.inference_mode():
        seen = side.see(inputs)
    _wait(contest.vlm)
    return seen


def _answer(contest: Contest, side: Side, inputs: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        seen = side.see(inputs)
    answer(contest.vlm, seen, [contest.question] * len(seen.features), max_new_tokens=1, decoder=side.decoder)
    _wait(contest.vlm)


def _wait(vlm: VLM) -> None:
    if vlm.device.type == "cuda":
        torch.cuda.synchronize(vlm.device)


# ── Memory ───────────────────────────────────────────────────────────────────


def peak_memory(prepare: Prepare, arguments: tuple[Any, ...], side: str, batch_size: int) -> int:
    """Bytes that one answer of a side needs on top of the loaded models, measured in a process of its own.

    On a CPU (Linux) the growth of the largest resident size, on a GPU what torch allocated at most. `prepare` must be a
    function of a module; it makes the contest anew from `arguments`.

    Raises:
        InfopruneError: the system does not tell, or ended the process, which it does when memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_peak, prepare, arguments, side, batch_size).result()
        except BrokenProcessPool:
            raise InfopruneError(
                f"peak memory of {side!r} at batch {batch_size}: its process was ended from outside, as when memory "
                "runs out; set smaller bench.batch_sizes or add --no-memory"
            ) from None


def _peak(prepare: Prepare, arguments: tuple[Any, ...], side: str, batch_size: int) -> int:
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    contest = prepare(*arguments)
    vlm, inputs = contest.vlm, contest.inputs(batch_size)
    gc.collect()
    if vlm.device.type == "cuda":
        before = torch.cuda.memory_allocated(vlm.device)
        torch.cuda.reset_peak_memory_stats(vlm.device)
        _answer(contest, contest.sides[side], inputs)
        return int(torch.cuda.max_memory_allocated(vlm.device) - before)
    before = reset_peak()
    _answer(contest, contest.sides[side], inputs)
    return max(0, peak() - before)


# ── Table ────────────────────────────────────────────────────────────────────


def render(result: Mapping[str, Any]) -> Table:
    """One row per batch size and side."""
    table = Table(
        "batch", "model", "visual tokens", "first token, ms (95%)", "p90", "of it encoder", "speed-up (95%)", "rounds",
        "peak MiB",
    )  # fmt: skip
    for row in result["rows"]:
        table.add_row(
            str(row["batch_size"]),
            row["side"],
            f"{row['visual_tokens']:.0f}",
            percentile_text(row["milliseconds"], "p50", 1),
            f"{row['milliseconds']['p90']:.1f}",
            f"{row['encoder_milliseconds']['p50']:.1f}",
            ratio_text(row["speedup"]),
            rounds_text(row),
            f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
        )
    return table
