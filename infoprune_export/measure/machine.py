"""What a latency figure depends on and no library version shows."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from infoprune_export.measure.results import Machine

_SMI = (
    "name",
    "driver_version",
    "pstate",
    "power.limit",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks_throttle_reasons.active",
    "temperature.gpu",
)


def machine() -> Machine:
    """Processor, clocks and power mode; tools that are not there, or do not answer in seconds, are left out."""
    model = platform.processor() or platform.machine()
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    mode = _ask("nvpmodel", "-q")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "governor": governor.read_text(encoding="utf-8").strip() if governor.is_file() else "not reported",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(_ask("nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader")),
        "power_mode": None if mode is None else " ".join(mode.split()),
    }


def _gpus(table: str | None) -> list[dict[str, str]]:
    """Rows of nvidia-smi's answer; a field that this driver does not know makes it answer with none."""
    rows = [[value.strip() for value in line.split(",")] for line in (table or "").splitlines()]
    return [dict(zip(_SMI, row, strict=True)) for row in rows if len(row) == len(_SMI)]


def _ask(program: str, *arguments: str) -> str | None:
    """A program's answer, or None."""
    if (path := shutil.which(program)) is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
