"""A build that can be watched and stopped: TensorRT's messages, its phases as progress lines, Ctrl-C.

The classes are made from the TensorRT that runs, which is known only then: its interfaces are C++ classes that Python
has to inherit from.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Result = TypeVar("Result")
_POLL = 0.2
"""Seconds. A signal that another thread received does not wake the main one."""
_WANTS_MEMORY = ("out of memory", "outofmemory", "insufficient memory", "insufficient workspace")


def message_log(trt: Any) -> Any:
    """An ``ILogger`` that keeps errors and warnings: ``errors`` and ``warnings``, lists of lines."""

    class MessageLog(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(msg)

    return MessageLog()


def last_error(log: Any) -> str:
    """The last error in one short line."""
    text = " ".join(log.errors[-1].split()) if log.errors else "TensorRT gave no reason"
    return text if len(text) <= 300 else text[:297] + "..."


def ran_out_of_memory(log: Any) -> bool:
    """Whether one of the errors is for want of memory. TensorRT says so in words only."""
    return any(words in message.lower() for message in log.errors for words in _WANTS_MEMORY)


def monitor(trt: Any, progress: Progress, cancelled: Event) -> Any:
    """An ``IProgressMonitor`` that shows each phase as a line below the stage's; it stops the build when told to."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._tasks: dict[str, TaskID] = {}
            self._depth: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._depth[phase_name] = self._depth.get(parent_phase or "", 0) + 1
            title = "  " * self._depth[phase_name] + phase_name
            self._tasks[phase_name] = progress.add_task(title, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._tasks:
                progress.update(self._tasks[phase_name], completed=step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._tasks:
                progress.remove_task(self._tasks.pop(phase_name))

    return Monitor()


def interruptible(work: Callable[[], Result], cancelled: Event) -> Result:
    """Call `work` in a thread; Ctrl-C sets `cancelled` and waits for it to end.

    Python sees a signal only between two of its own instructions on the main thread, and a build spends minutes
    inside one.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = Thread(target=run, name="tensorrt", daemon=True)
    try:
        thread.start()
        while not wait([outcome], timeout=_POLL).done:
            pass
    except KeyboardInterrupt:
        cancelled.set()
        if thread.is_alive():
            wait([outcome])
        raise
    return outcome.result()
