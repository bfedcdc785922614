"""Makes token_select.ptx of token_select.cuh: ``python engines/token_select/compile.py NVRTC_FOLDER``.

NVRTC_FOLDER is where the package nvidia-cuda-nvrtc (13.x, from PyPI) is unpacked or installed; no GPU is needed. NVRTC
writes the newest version of PTX it knows, which older drivers refuse, so the header is lowered to 7.0, the first that
knows all that is used here; a test assembles the result for every GPU. The target 7.5 is the oldest that NVRTC 13 has.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
PTX_VERSION, ARCHITECTURE = "7.0", "75"
OPTIONS = (f"--gpu-architecture=compute_{ARCHITECTURE}", "--std=c++17")


def main(arguments: Sequence[str]) -> int:
    """Write the PTX beside the source; 1 if that fails, 2 if the arguments are not one folder."""
    if len(arguments) != 1:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    source = (FOLDER / "token_select.cuh").read_bytes()
    try:
        ptx = compile_ptx(load_nvrtc(Path(arguments[0])), source)
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    digest = hashlib.sha256(source).hexdigest()
    (FOLDER / "token_select.ptx").write_text(f"// source sha256: {digest}\n{lowered(ptx)}", encoding="ascii")
    return 0


def load_nvrtc(folder: Path) -> ctypes.CDLL:
    """The library below a folder."""
    for name in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
        found = sorted(path for path in folder.rglob(name) if "alt" not in path.name)
        if not found:
            raise OSError(f"{folder}: no {name} below it; unpack nvidia-cuda-nvrtc there")
        library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    return library


def compile_ptx(nvrtc: ctypes.CDLL, source: bytes) -> str:
    """PTX of CUDA source text, by NVRTC."""

    def call(name: str, *values: object) -> None:
        if status := getattr(nvrtc, name)(*values):
            raise RuntimeError(f"{name} failed with status {status}\n{log()}")

    def text(size: str, get: str) -> str:
        length = ctypes.c_size_t()
        getattr(nvrtc, size)(program, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(length.value)
        getattr(nvrtc, get)(program, buffer)
        return buffer.value.decode()

    def log() -> str:
        return text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")

    program = ctypes.c_void_p()
    call("nvrtcCreateProgram", ctypes.byref(program), source, b"token_select.cuh", 0, None, None)
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    call("nvrtcCompileProgram", program, len(OPTIONS), options)
    ptx = text("nvrtcGetPTXSize", "nvrtcGetPTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx


def lowered(ptx: str) -> str:
    """The same instructions under the oldest header that has all of them."""
    text, count = re.subn(r"^\.version [\d.]+$", f".version {PTX_VERSION}", ptx, flags=re.MULTILINE)
    if count != 1 or f".target sm_{ARCHITECTURE}" not in text:
        raise RuntimeError("this is not the PTX that NVRTC was asked for")
    return text


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
