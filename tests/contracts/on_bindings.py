"""Our classes that inherit from TensorRT's, made and called with the real bindings of a folder.

Usage: python tests/contracts/on_bindings.py BINDINGS -o FILE; writes what they did as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from threading import Event

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.digest import import_bindings
from rich.progress import Progress

from infoprune_export.engine.tensorrt.api import load_tensorrt
from infoprune_export.engine.tensorrt.progress import message_log, monitor, ran_out_of_memory


def main(folder: Path, output: Path) -> None:
    with tempfile.TemporaryDirectory() as libraries:
        import_bindings(folder, Path(libraries))
    trt = load_tensorrt()
    severity = trt.ILogger.Severity
    log = message_log(trt)
    for member in (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING, severity.INFO, severity.VERBOSE):
        log.log(member, f"{member.name}: out of memory")
    cancelled, progress = Event(), Progress(disable=True)
    watch = monitor(trt, progress, cancelled)
    watch.phase_start("Building", None, 2)
    titles = [task.description for task in progress.tasks]
    going_on = [watch.step_complete("Building", 0)]
    cancelled.set()
    going_on.append(watch.step_complete("Building", 1))
    watch.phase_finish("Building")
    result = {
        "version": trt.__version__,
        "errors": log.errors,
        "warnings": log.warnings,
        "memory": ran_out_of_memory(log),
        "kinds": [isinstance(log, trt.ILogger), isinstance(watch, trt.IProgressMonitor)],
        "titles": titles,
        "going_on": going_on,
        "tasks_left": len(progress.tasks),
        "strongly_typed": 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
    }
    output.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[3]))
