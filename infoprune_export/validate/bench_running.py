"""An encoder with its inputs in place, ready to be called again and again; what it last computed can be looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infoprune_export.engine.onnxruntime import feed_of, open_session, runtime_target
from infoprune_export.errors import InfopruneError
from infoprune_export.measure.latency import Calls, Clock, Limits, Opener, cuda_clock, wall_clock
from infoprune_export.models.tower import Planned
from infoprune_export.recipe import BenchSpec, Target

Arrays = dict[str, NDArray[Any]]
_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


@dataclass(frozen=True)
class Running:
    """One side, on the images of one batch size."""

    call: Callable[[], object]
    """Encodes all images, in as many calls of the encoder as it takes, and returns when the device has finished."""
    outputs: Callable[[], list[Arrays]]
    """Outputs of each call of the encoder, as the latest `call` left them; floats in fp32."""


def device_of(target: Target) -> str:
    """``cuda`` or ``cpu``, where a target's first provider computes."""
    return "cuda" if runtime_target(target).providers[0] in _ON_CUDA else "cpu"


def clock_of(device: str) -> Clock:
    """Events on a GPU, which no host's scheduler delays; else the host's clock."""
    return cuda_clock if device == "cuda" else wall_clock


def rounds_of(spec: BenchSpec) -> Limits:
    """When rounds end, by a recipe's bench section."""
    return Limits(spec.rounds, spec.most_rounds, spec.max_seconds, spec.max_interval, spec.warmup)


def check_provider(session: Any, target: Target) -> None:
    """Refuse a session that fell back to another provider than its target's.

    Raises:
        InfopruneError: the provider did not start.
    """
    wanted, started = runtime_target(target).providers[0], session.get_providers()[0]
    if wanted != started:
        raise InfopruneError(
            f"target {target.name}: {wanted} did not start, only {started}; run infoprune-export doctor"
        )


def session_running(session: Any, calls: Sequence[Planned], device: str) -> Running:
    """An ONNX Runtime session. On a GPU inputs and outputs stay there, so that copies are no part of the figures."""
    names = [value.name for value in session.get_outputs()]
    if device != "cpu":
        return _bound(session, calls, device)
    feeds = [feed_of(session, planned) for planned in calls]
    latest: list[list[NDArray[Any]]] = []

    def call() -> None:
        latest[:] = [session.run(None, feed) for feed in feeds]

    return Running(call, lambda: [_floats(dict(zip(names, values, strict=True))) for values in latest])


def _bound(session: Any, calls: Sequence[Planned], device: str) -> Running:
    import onnxruntime

    names = [value.name for value in session.get_outputs()]
    bindings = []
    for planned in calls:
        binding = session.io_binding()
        for name, value in feed_of(session, planned).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
        for name in names:
            binding.bind_output(name, device)
        bindings.append(binding)

    def call() -> None:
        for binding in bindings:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

    def outputs() -> list[Arrays]:
        return [_floats(dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))) for binding in bindings]

    return Running(call, outputs)


@dataclass(frozen=True)
class Graph:
    """An exported encoder."""

    open: Callable[[], Any]
    """Gives a session of ONNX Runtime."""
    device: str


def graph_of(model: Path, target: Target, threads: int) -> Graph:
    """An ONNX file on a target; opening it raises `InfopruneError` where the target's provider does not start."""

    def open_checked() -> Any:
        session = open_session(model, target, threads=threads)
        check_provider(session, target)
        return session

    return Graph(open_checked, device_of(target))


class Sessions:
    """Sessions of several graphs, by name."""

    def __init__(self, graphs: Mapping[str, Graph]) -> None:
        self._graphs = graphs
        self._opened: dict[str, Any] = {}

    @property
    def provider(self) -> str:
        """Of the sessions that are open."""
        return str(next(iter(self._opened.values())).get_providers()[0])

    def close(self) -> None:
        self._opened.clear()

    def open(self, order: Sequence[str]) -> None:
        """All that run on a CPU anew, in this order of their names, once those of before are closed.

        What is open on a GPU stays, as opening may build a TensorRT engine; whether memory's luck matters there has not
        been measured.
        """
        self._opened = {name: session for name, session in self._opened.items() if self._graphs[name].device != "cpu"}
        for name in order:
            if name in self._graphs and name not in self._opened:
                self._opened[name] = self._graphs[name].open()

    def on(self, calls: Mapping[str, Sequence[Planned]]) -> dict[str, Running]:
        """Every session, with the planned tensors of its calls in place."""
        return {
            name: session_running(session, calls[name], self._graphs[name].device)
            for name, session in self._opened.items()
        }

    def opener(self, calls: Mapping[str, Sequence[Planned]], others: Calls | None = None) -> Opener:
        """Opens all sessions for `latency.until_narrow`, each called once; `others` stay as they are."""

        def open_calls(order: Sequence[str]) -> Calls:
            self.open(order)
            ready = {name: running.call for name, running in self.on(calls).items()}
            for call in ready.values():
                call()
            return ready | dict(others or {})

        return open_calls


def module_running(
    function: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], calls: Sequence[Planned], device: str
) -> Running:
    """A function in PyTorch from tensors on `device` to named outputs."""
    placed = [{name: value.to(device) for name, value in planned.items()} for planned in calls]
    latest: list[Mapping[str, Tensor]] = []

    def call() -> None:
        with torch.inference_mode():
            latest[:] = [function(planned) for planned in placed]
        if device == "cuda":
            torch.cuda.synchronize()

    return Running(call, lambda: [_floats({k: _numpy(v) for k, v in one.items()}) for one in latest])


def _numpy(value: Tensor) -> NDArray[Any]:
    return (value.float() if value.is_floating_point() else value).cpu().numpy()


def _floats(arrays: Arrays) -> Arrays:
    return {k: v.astype(np.float32) if np.issubdtype(v.dtype, np.floating) else v for k, v in arrays.items()}
