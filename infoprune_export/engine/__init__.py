"""Engines: an exported encoder made ready to run on one kind of machine."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import Target

if TYPE_CHECKING:
    from infoprune_export.engine.base import Backend, Engine

# Target.backend -> class, imported when a target asks for it.
BACKENDS = {
    "onnxruntime": "infoprune_export.engine.onnxruntime:OnnxRuntimeBackend",
    "tensorrt": "infoprune_export.engine.tensorrt.runtime:TensorRtBackend",
}


def backend_of(target: Target) -> Backend:
    """The target's backend, checked to be usable on this machine.

    Raises:
        InfopruneError: a package or provider is missing; the message names the command that installs it.
    """
    module, _, name = BACKENDS[target.backend].partition(":")
    backend: Backend = getattr(import_module(module), name)()
    backend.check(target)
    return backend


def open_engine(folder: Path, target: Target) -> Engine:
    """Open an engine folder that `Backend.build` wrote."""
    if not (folder / "engine.json").is_file():
        raise InfopruneError(f"{folder}: no engine here (engine.json is missing); run infoprune-export build first")
    return backend_of(target).open(folder)
