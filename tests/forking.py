"""`infoprune-export` in processes of its own that start at once: forked from one that has imported everything already.

What a test gets is a real process with the real command in it, to be watched, killed or waited for; only the seconds
that PyTorch and transformers take to import are spent once. Nothing is computed before the fork, so no thread pool
exists that a child would miss.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent

STAGES = (
    "data baseline decoder gates budget heads ffn recovery language checkpoint accuracy onnx engine validation".split()
)
SMALL = (
    "data.calibration_images=16",
    "data.validation_questions=24",
    "heads.method=budgeted",
    "heads.epochs=3",
    "recovery.method=distill",
    "recovery.epochs=2",
    "bench.rounds=3",
    "bench.warmup=0",
    "variants={}",
)
"""A run of every stage that trains, in seconds."""


class Forked:
    """One running command, the leader of a process group of its own."""

    def __init__(self, server: Forker, pid: int, errors: Path) -> None:
        self._server, self.pid, self._errors = server, pid, errors
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, seconds: float = 300) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running after {seconds} s: {self.stderr()}"
            time.sleep(0.005)
        return code

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal to the whole group and wait for the end."""
        if self.poll() is None:
            os.killpg(self.pid, number)
        return self.wait()

    def stderr(self) -> str:
        return self._errors.read_text(encoding="utf-8", errors="replace")


@dataclass
class Forker:
    """The process that everything is forked from; its children see `environment` and the hash seed it started with."""

    process: subprocess.Popen[str]
    scratch: Path
    started: int = 0

    @classmethod
    def launch(cls, scratch: Path, environment: Mapping[str, str]) -> Forker:
        process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return cls(process, scratch)

    def start(self, arguments: Sequence[str], limits: Mapping[str, int] | None = None) -> Forked:
        """The command line's `main` on these arguments, in a new process.

        `limits` are names of `resource`'s limits, and what the process may have beyond what it starts with.
        """
        self.started += 1
        errors = self.scratch / f"stderr-{self.started}.txt"
        pid = self.ask({"arguments": list(arguments), "stderr": str(errors), "limits": dict(limits or {})})
        return Forked(self, pid, errors)

    def ask(self, request: Mapping[str, Any]) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


# ── In the process that is forked ────────────────────────────────────────────


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Start and poll until the requests end."""
    for module in _MODULES:
        importlib.import_module(module)
    for line in requests:
        request = json.loads(line)
        result = poll(request["poll"]) if "poll" in request else fork(**request)
        answers.write(json.dumps(result) + "\n")
        answers.flush()


_MODULES = (
    "infoprune_export.cli",
    "infoprune_export.engine.onnxruntime",
    "infoprune_export.export.onnx",
    "infoprune_export.heads.train",
    "infoprune_export.models.processors",
    "infoprune_export.recovery.distill",
    "infoprune_export.rewrite.checkpoint",
    "infoprune_export.stages",
    "infoprune_export.validate.verdict",
    "torch._dynamo",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
)


def fork(arguments: Sequence[str], stderr: str, limits: Mapping[str, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        errors = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for target, source in ((0, nothing), (1, nothing), (2, errors)):
            os.dup2(source, target)
        for name, beyond in limits.items():
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = beyond + (taken if name == "RLIMIT_AS" else 0)
            resource.setrlimit(getattr(resource, name), (limit, limit))
        from infoprune_export.cli import main

        main(list(arguments), prog_name="infoprune-export")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def poll(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
