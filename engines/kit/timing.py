"""Latency of an engine, with the clocks it ran at: a figure without them cannot be compared with another."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from device import Cuda, Session
from shared import KitError

_BUSY = 50
_SMI = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu", "pstate")


def measure(cuda: Cuda, session: Session, rounds: int, warmup: int, graph: bool = False) -> dict[str, Any]:
    """Milliseconds of `rounds` calls on the loaded inputs, on the device and as the host waits for them.

    Copies to and from the device are not included. With `graph` the call is launched as one CUDA graph.
    """
    launch = session.enqueue
    for _ in range(warmup):
        launch()
    cuda.synchronise()
    if graph:
        try:
            launch = cuda.capture(session.enqueue)
        except KitError as error:
            raise KitError(f"the engine cannot become a CUDA graph ({error}); run without --cuda-graph") from None
        launch()
        cuda.synchronise()
    idle, device, host = clocks(cuda), [], []
    for _ in range(rounds):
        began = time.perf_counter()
        cuda.start()
        launch()
        device.append(cuda.stop())
        host.append((time.perf_counter() - began) * 1000)
    for _ in range(min(rounds, _BUSY)):
        launch()
    busy = clocks(cuda)  # while those calls run
    cuda.synchronise()
    return {
        "rounds": rounds,
        "device_ms": percentiles(device),
        "host_ms": percentiles(host),
        "flags": {"cuda_graph": graph, "copies_included": False, "warmup": warmup},
        "clocks": {"idle": idle, "busy": busy},
    }


def percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)}


# ── Clocks ───────────────────────────────────────────────────────────────────


def clocks(cuda: Cuda) -> dict[str, str]:
    """What the system tells about the GPU's clocks and power mode now; empty where it tells nothing."""
    found: dict[str, str] = {}
    for folder in sorted(Path("/sys/class/devfreq").glob("*")):
        # Jetson calls it 17000000.gpu (Orin) or gpu-gpc-0 (Thor).
        if "gpu" in folder.name or "gpc" in folder.name:
            for name in ("cur_freq", "max_freq"):
                text = _read(folder / name)
                if text:
                    found[f"{folder.name}.{name}"] = text
    answer = _ask("nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits", f"--id={cuda.bus}")
    values = [value.strip() for value in answer.split(",")]
    if len(values) == len(_SMI):
        found.update({name: value for name, value in zip(_SMI, values) if value not in ("", "[N/A]", "N/A")})
    mode = _ask("nvpmodel", "-q")
    if mode:
        found["nvpmodel"] = " ".join(mode.split())
    if not any("freq" in name or "clocks" in name for name in found):
        line = _first_line("tegrastats")
        if line:
            found["tegrastats"] = line
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _ask(program: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _first_line(program: str) -> str:
    """Of a program that prints for ever."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        with subprocess.Popen([path], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            line = process.stdout.readline().strip() if process.stdout else ""
            process.terminate()
    except OSError:
        return ""
    return line
