"""Training the gates in several processes on this machine, each a fresh interpreter that runs `worker`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from infoprune_export.errors import InfopruneError
from infoprune_export.heads.train import Progress, Trained

JOB, PROGRESS, RESULT = "job.json", "progress.jsonl", "trained.safetensors"
_LOG = "worker-{}.log"
_POLL_SECONDS = 0.1


def train_in_processes(
    recipe: Mapping[str, Any],
    data: Path,
    device: str,
    processes: int,
    scratch: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Have `processes` workers train the gates of a recipe, and wait for them.

    Args:
        recipe: as `Recipe.to_dict` gives it.
        data: folder of the data stage.
        device: ``cpu``, or ``cuda`` for one GPU per process.
        processes: how many.
        scratch: where training state is kept, and everything else that the workers write until they are done.
        on_step: called for every finished step.

    Raises:
        InfopruneError: a worker ended before its time; with what it last said.
    """
    job = {"recipe": recipe, "data": str(data.resolve()), "device": device, "scratch": str(scratch.resolve())}
    (scratch / JOB).write_text(json.dumps(job), encoding="utf-8")
    for name in (PROGRESS, RESULT):
        (scratch / name).unlink(missing_ok=True)
    workers: list[subprocess.Popen[bytes]] = []
    logs = [scratch / _LOG.format(rank) for rank in range(processes)]
    try:
        port = _free_port()
        for rank, log in enumerate(logs):
            with log.open("wb") as stderr:
                workers.append(
                    subprocess.Popen(  # noqa: S603  (this package's own module)
                        [sys.executable, "-m", "infoprune_export.heads.worker", str(scratch / JOB)],
                        env={**os.environ, **_environment(rank, processes, port, device)},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                    )
                )
        _follow(workers, logs, scratch / PROGRESS, on_step)
        return _read(scratch / RESULT)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()
        for path in (*logs, *(scratch / name for name in (JOB, PROGRESS, RESULT))):
            path.unlink(missing_ok=True)


def _environment(rank: int, processes: int, port: int, device: str) -> dict[str, str]:
    """What torch.distributed and accelerate read."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": str(device == "cpu").lower(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _follow(
    workers: list[subprocess.Popen[bytes]], logs: list[Path], progress: Path, on_step: Callable[[Progress], None]
) -> None:
    seen = 0
    while True:
        codes = [worker.poll() for worker in workers]
        seen = _report(progress, seen, on_step)
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # The others fail soon after the first, for want of it.
            first = min(failed, key=lambda rank: (logs[rank].stat().st_mtime_ns, rank))
            raise InfopruneError(
                f"gate training: process {first} of {len(workers)} ended with code {codes[first]}"
                f"{_last_words(logs[first])}; train with heads.processes = 1, or mend that and run again"
            )
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_SECONDS)


def _report(path: Path, seen: int, on_step: Callable[[Progress], None]) -> int:
    """Hand on the lines behind the first `seen` bytes; returns how many bytes are seen now."""
    if not path.is_file():
        return seen
    with path.open("rb") as file:
        file.seek(seen)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.splitlines():
        on_step(Progress(**json.loads(line)))
    return seen + len(whole)


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:400]}" if lines else ""


def _read(path: Path) -> Trained:
    with safe_open(path, "pt") as file:
        history = json.loads(file.metadata()["history"])
        return Trained(file.get_tensor("scores"), file.get_tensor("gates"), history)
