"""Memory of one side of a bench, in a process of its own: what it holds, and what a call takes on top."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from infoprune_export.engine.onnxruntime import load_runtime
from infoprune_export.errors import InfopruneError
from infoprune_export.measure.memory import held_on_gpu, peak, reset_peak
from infoprune_export.measure.results import Memory
from infoprune_export.validate.bench_case import BenchCase, Side
from infoprune_export.validate.bench_running import session_running
from infoprune_export.validate.peers import Peer, peer_of

Prepare = Callable[..., BenchCase]


def memory_of(prepare: Prepare, arguments: tuple[Any, ...], peer: str | None, side: Side, batch_size: int) -> Memory:
    """Of a side in ONNX Runtime, or in a peer.

    Weights are the growth of the resident size by opening the side, transients and the runtime itself left out; where
    PyTorch runs what was loaded before, they are counted. The call's bytes are the growth of the peak. On a GPU both
    are of what is in use on the device, so nobody else may compute there.

    Raises:
        InfopruneError: the system does not tell, or ended the process, which it does when memory runs out.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, prepare, arguments, peer, side, batch_size).result()
        except BrokenProcessPool:
            raise InfopruneError(
                f"memory of {peer or 'ONNX Runtime'}, {side}, batch {batch_size}: its process was ended from outside, "
                "as when memory runs out; set smaller bench.batch_sizes or bench.memory=false"
            ) from None


def _measure(prepare: Prepare, arguments: tuple[Any, ...], name: str | None, side: Side, batch_size: int) -> Memory:
    from infoprune_export.console import quiet_libraries

    quiet_libraries()
    case = prepare(*arguments)
    torch.set_num_threads(case.spec.threads)
    load = case.load(batch_size)
    peer: Peer | None = None if name is None else peer_of(name)
    on_gpu = case.device == "cuda"
    if on_gpu:
        torch.cuda.init()
    if peer is None:
        load_runtime(case.target)
    else:
        peer.load(case)
    before = held_on_gpu() if on_gpu else _resident()
    if peer is None:
        running = session_running(case.open(side), load.calls[side], case.device)
    else:
        running = peer.prepare(case, side)(load)
    opened = held_on_gpu() if on_gpu else _resident()
    weights = opened - before
    if peer is not None and peer.weights is not None and not on_gpu:
        weights = peer.weights(case, side)
        running.call()  # (which may compile)
        opened = _resident()
    running.call()
    most = held_on_gpu() if on_gpu else peak()
    return {"weights_bytes": max(0, weights), "call_bytes": max(0, most - opened)}


def _resident() -> int:
    gc.collect()
    return reset_peak()
