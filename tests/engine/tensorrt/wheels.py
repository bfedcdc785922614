"""Where NVIDIA's wheels are unpacked, for tests that look at the real thing; they are optional and never shipped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("INFOPRUNE_TENSORRT_WHEELS", REPOSITORY / "build" / "tensorrt"))


def unpacked(pattern: str, package: str) -> Path:
    """The first file or folder below the wheels' folder that fits a pattern; skips the test where there is none."""
    found = sorted(FOLDER.rglob(pattern)) if FOLDER.is_dir() else []
    if not found:
        pytest.skip(f"{package} is not unpacked below {FOLDER} (no {pattern})")
    return found[0]


def compiler(*names: str) -> str:
    """A compiler of this machine; skips the test where there is none."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no compiler on this machine (looked for {', '.join(names)})")
