"""Peak memory of this process (Linux) and of its GPU."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

from infoprune_export.errors import InfopruneError

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak() -> int:
    """Forget this process's largest resident size so far (loading a model has one of its own); returns the present.

    Raises:
        InfopruneError: the system has no such thing.
    """
    # What loading freed, the C library may hold on to: an answer could use it without growing the process.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR_REFS.write_text("5")
        status("VmHWM")
        return status("VmRSS")
    except OSError as error:
        raise InfopruneError(
            f"peak memory on a CPU needs Linux's {_CLEAR_REFS} ({error.strerror}); leave it out: --no-memory, or "
            "--set bench.memory=false"
        ) from None


def peak() -> int:
    """Largest resident size in bytes since `reset_peak`."""
    return status("VmHWM")


def status(field: str) -> int:
    """Bytes of a memory field of this process."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise InfopruneError(
        f"peak memory on a CPU needs {field} in {_STATUS}, which is not there; leave it out: --no-memory, or --set "
        "bench.memory=false"
    )


def held_on_gpu() -> int:
    """Bytes in use on the current CUDA device, by whoever allocated them.

    An engine with an allocator of its own, as ONNX Runtime's arena, keeps what it needed at most.
    """
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
