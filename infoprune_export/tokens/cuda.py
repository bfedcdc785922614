"""The kernel of ``infoprune::TokenSelect`` on PyTorch's tensors, launched through the CUDA driver's C interface.

The driver compiles the kernel's PTX when a device first needs it, which no other package or compiler is needed for.
Whatever the kernel cannot do is left to PyTorch, with the same answer: see `token_select`.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from infoprune_export.tokens import kernel
from infoprune_export.tokens.kernel import Settings

DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
Functions = dict[torch.dtype, ctypes.c_void_p]


def token_select(features: Tensor, prior: Tensor, counts: Tensor, settings: Settings) -> Tensor | None:
    """`select.token_select` of tensors on a CUDA device, or None where that is left to PyTorch.

    None for float64, for no tokens, for sizes beyond `kernel.refusal`, for AMD's GPUs, and for devices whose driver
    does not take the PTX (compute capability below 7.5, or a driver older than CUDA 11.0).
    """
    batch, tokens, width = features.shape
    if not {features.dtype, prior.dtype} <= set(_DTYPES) or min(batch, tokens, width) == 0 or torch.version.hip:
        return None
    if kernel.refusal(tokens, width, settings) is not None:
        return None
    # The driver's calls act on the current device and its context.
    with torch.cuda.device(features.device):
        functions = _functions_of(features.device.index)
        if functions is None:
            return None
        stream = torch.cuda.current_stream().cuda_stream
        return launch(_driver(DRIVER), functions, stream, features, prior, counts, settings)


@cache
def _functions_of(device: int) -> Functions | None:
    return load(_driver(DRIVER), kernel.read_ptx())


@cache
def _driver(library: str) -> ctypes.CDLL:
    driver = ctypes.CDLL(library)
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuModuleLoadData.argtypes = [ctypes.POINTER(pointer), ctypes.c_char_p]
    driver.cuModuleGetFunction.argtypes = [ctypes.POINTER(pointer), pointer, ctypes.c_char_p]
    driver.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, ctypes.POINTER(pointer), pointer]
    return driver


def load(driver: ctypes.CDLL, ptx: str) -> Functions | None:
    """The kernel for each type of features in the current context, where it stays; None if the driver refuses it."""
    module = ctypes.c_void_p()
    if driver.cuModuleLoadData(ctypes.byref(module), ptx.encode()):
        return None
    functions = {}
    for dtype, name in _DTYPES.items():
        function = ctypes.c_void_p()
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.ENTRY_POINTS[name].encode()))
        functions[dtype] = function
    return functions


def launch(
    driver: ctypes.CDLL,
    functions: Functions,
    stream: int,
    features: Tensor,
    prior: Tensor,
    counts: Tensor,
    settings: Settings,
) -> Tensor:
    """Queue the kernel on a stream; int64 [B, T] as `select.token_select` returns it.

    Raises:
        RuntimeError: the driver refuses the launch.
    """
    batch, tokens, width = features.shape
    inputs = features.contiguous(), prior.float().contiguous(), counts.to(torch.int32).contiguous()
    kept = features.new_empty((batch, kernel.keep_size(tokens, settings)), dtype=torch.int32)
    work = features.new_empty((batch, kernel.work_size(tokens, width, settings)), dtype=torch.float32)
    arguments = _arguments(inputs, kernel.scalars(tokens, width, settings), (kept, work))
    shared = kernel.shared_bytes(tokens, width, settings)
    function = functions[features.dtype]
    _check(driver.cuLaunchKernel(function, batch, 1, 1, kernel.THREADS, 1, 1, shared, stream or None, arguments, None))
    return kept.long()


def _arguments(inputs: tuple[Tensor, ...], scalars: list[int], outputs: tuple[Tensor, ...]) -> Any:
    """An array of the addresses at which the launch finds its arguments; it keeps what they hold alive."""
    values: list[Any] = [ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs]
    values += [ctypes.c_int32(value) for value in scalars]
    values += [ctypes.c_void_p(tensor.data_ptr()) for tensor in outputs]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    addresses.values = values  # type: ignore[attr-defined]
    return addresses


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refused the launch of token_select with status {status}")
