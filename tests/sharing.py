"""Folders that several test files look at, made once in a session by whichever test process asks first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def top(factory: pytest.TempPathFactory) -> Path:
    """The session's temporary folder, the same one in all of its test processes."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name, which nobody may change; `make` is given an empty one to fill if there is none."""
    folder = top(factory) / f"shared-{name}"
    once(folder, make)
    return folder


def once(folder: Path, make: Callable[[Path], object]) -> None:
    """Fill a folder that is not there, while whoever else wants it waits."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            scratch = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(scratch, ignore_errors=True)  # of a maker that failed
            scratch.mkdir()
            make(scratch)
            scratch.rename(folder)
