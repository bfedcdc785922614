"""Several processes on this machine that work as one, each a fresh interpreter that runs a module on the same job."""

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

from infoprune_export.errors import InfopruneError

JOB, PROGRESS = "job.json", "progress.jsonl"
_LOG = "worker-{}.log"
_POLL_SECONDS = 0.1


def launch(
    module: str,
    job: Mapping[str, Any],
    processes: int,
    device: str,
    scratch: Path,
    *,
    what: str,
    advice: str,
    on_line: Callable[[dict[str, Any]], None] = lambda line: None,
) -> None:
    """Run ``python -m module JOB.json`` in `processes` processes, and wait for them.

    Args:
        module: reads the job, starts accelerate, and may append JSON objects to `PROGRESS` in `scratch`, a line each.
        job: plain JSON types.
        processes: how many.
        device: ``cpu``, or ``cuda`` for one GPU per process.
        scratch: where job, progress and logs are until the processes are done.
        what: what they do, for an error.
        advice: what to do about one, for an error.
        on_line: called for every object of `PROGRESS`.

    Raises:
        InfopruneError: a process ended before its time; with what it last said.
    """
    (scratch / JOB).write_text(json.dumps(job), encoding="utf-8")
    (scratch / PROGRESS).unlink(missing_ok=True)
    workers: list[subprocess.Popen[bytes]] = []
    logs = [scratch / _LOG.format(rank) for rank in range(processes)]
    try:
        port = _free_port()
        for rank, log in enumerate(logs):
            with log.open("wb") as stderr:
                workers.append(
                    subprocess.Popen(  # noqa: S603  (this package's own modules)
                        [sys.executable, "-m", module, str(scratch / JOB)],
                        env={**os.environ, **_environment(rank, processes, port, device)},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                    )
                )
        _follow(workers, logs, scratch / PROGRESS, on_line, what, advice)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()
        for path in (*logs, scratch / JOB, scratch / PROGRESS):
            path.unlink(missing_ok=True)


def tell(scratch: Path, line: Mapping[str, Any]) -> None:
    """From a process: hand an object to the `on_line` of the one that launched it."""
    with (scratch / PROGRESS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


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
    workers: list[subprocess.Popen[bytes]],
    logs: list[Path],
    progress: Path,
    on_line: Callable[[dict[str, Any]], None],
    what: str,
    advice: str,
) -> None:
    seen = 0
    while True:
        codes = [worker.poll() for worker in workers]
        seen = _report(progress, seen, on_line)
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # The others fail soon after the first, for want of it.
            first = min(failed, key=lambda rank: (logs[rank].stat().st_mtime_ns, rank))
            raise InfopruneError(
                f"{what}: process {first} of {len(workers)} ended with code {codes[first]}"
                f"{_last_words(logs[first])}; {advice}, or mend that and run again"
            )
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_SECONDS)


def _report(path: Path, seen: int, on_line: Callable[[dict[str, Any]], None]) -> int:
    """Hand on the lines behind the first `seen` bytes; returns how many bytes are seen now."""
    if not path.is_file():
        return seen
    with path.open("rb") as file:
        file.seek(seen)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.splitlines():
        on_line(json.loads(line))
    return seen + len(whole)


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:400]}" if lines else ""
