"""The CUDA kernel of ``infoprune::TokenSelect`` as its callers see it: sizes, limits, arguments, and where its PTX is.

TensorRT's ahead-of-time plugin knows extents only as symbols, so the sizes are written in sums, products, floor
divisions and minima, which symbols have too. ``engines/token_select/token_select.cuh`` states them for C++.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infoprune_export.shipped import shipped_folder
from infoprune_export.tokens.select import EPSILON

THREADS = 512
"""Of a block; the kernel takes any multiple of 32 up to this."""
SHARED_BYTES = 48 * 1024
"""Of dynamic shared memory: what every GPU grants a block that does not ask for more."""
ENTRY_POINTS = {"float32": "token_select_f32", "float16": "token_select_f16", "bfloat16": "token_select_bf16"}
"""Kernel by dtype of the features."""
_LANES, _INT32 = 32, 2**31
_EXACT_IN_FP32 = 2**24
_POOL_STEPS = 1024

Extent = Any
"""An int, or a symbol with ``+``, ``*`` and ``//`` whose left side is a symbol."""


@dataclass(frozen=True)
class Settings:
    """Attributes of the operator; see `select.token_select`."""

    keep_numerator: int
    keep_denominator: int
    pool_factor: float = 2.0
    temperature: float = 0.7
    exponent: float = 0.5
    epsilon: float = EPSILON


# ── Sizes ────────────────────────────────────────────────────────────────────


def keep_size(tokens: Extent, settings: Settings) -> Extent:
    """T = ceil(N * numerator / denominator)."""
    return (tokens * settings.keep_numerator + (settings.keep_denominator - 1)) // settings.keep_denominator


def work_size(tokens: Extent, width: Extent, settings: Settings, least: Callable[..., Extent] = min) -> Extent:
    """W, the floats of scratch for one image of `work` [B, W]: at least min(T, D) M + 3 M + T for a pool of M tokens.

    M = min(N, ceil(alpha T)) has no symbolic form for any alpha; here alpha is rounded up to a multiple of 1/1024,
    and where it is one, W is exact.
    """
    keep = keep_size(tokens, settings)
    # A factor of so many tokens takes all of them; a larger one would overflow 64 bits.
    factor = math.ceil(min(float(np.float32(settings.pool_factor)), _EXACT_IN_FP32) * _POOL_STEPS)
    pool = least(tokens, (keep * factor + (_POOL_STEPS - 1)) // _POOL_STEPS)
    return (least(keep, width) + 3) * pool + keep


def shared_bytes(
    tokens: Extent, width: Extent, settings: Settings, least: Callable[..., Extent] = min, threads: int = THREADS
) -> Extent:
    """Dynamic shared memory of a block: the pivot's vector and its column of the factor, and two rounds of sums."""
    keep = keep_size(tokens, settings)
    return (width + least(keep, width) + (2 + 2 * (_LANES + 1) * (threads // _LANES))) * 4


def scalars(tokens: Extent, width: Extent, settings: Settings, least: Callable[..., Extent] = min) -> list[Extent]:
    """The ten 32-bit arguments between the kernel's inputs and its outputs, in order; floats are given by their bits.

    A launch is ``kernel<<<B, threads, shared_bytes>>>(features, prior, counts, *scalars, kept, work)``.
    """
    return [
        tokens,
        width,
        keep_size(tokens, settings),
        work_size(tokens, width, settings, least),
        settings.keep_numerator,
        settings.keep_denominator,
        *map(_bits, (settings.pool_factor, settings.temperature, settings.exponent, settings.epsilon)),
    ]


def _bits(value: float) -> int:
    """Of a float as fp32, as a signed integer."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def refusal(tokens: int, width: int, settings: Settings) -> str | None:
    """Why the kernel cannot select from images of up to `tokens` tokens [N, D], in one line; None if it can."""
    numerator, denominator = settings.keep_numerator, settings.keep_denominator
    if not 1 <= numerator <= denominator < _INT32:
        return f"keep_ratio {numerator}/{denominator} is outside (0, 1] or over 31 bits; reduce the fraction"
    lowest, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    for name, low in {"pool_factor": 1.0, "temperature": lowest, "exponent": 0.0, "epsilon": 0.0}.items():
        if not low <= (value := getattr(settings, name)) <= most:
            return f"{name} is {value}, outside {low:.7g} to {most:.7g}; change it in the recipe"
    if tokens >= _EXACT_IN_FP32:
        return f"{tokens} tokens in one image are more than fp32 counts, {_EXACT_IN_FP32 - 1}; use smaller images"
    if (wanted := shared_bytes(tokens, width, settings)) > SHARED_BYTES:
        return (
            f"{width} dimensions and {keep_size(tokens, settings)} kept tokens need {wanted} bytes of shared memory, "
            f"a block has {SHARED_BYTES}; keep fewer tokens or use the operator's portable body"
        )
    if (floats := work_size(tokens, width, settings)) >= _INT32:
        return f"{tokens} tokens in one image need {floats} floats of scratch, over {_INT32 - 1}; keep fewer of them"
    return None


# ── Files ────────────────────────────────────────────────────────────────────


def source_hash(folder: Path | None = None) -> str:
    """The sha256 of the kernel's source, which its PTX names."""
    source = (folder or shipped_folder("token_select")) / "token_select.cuh"
    return hashlib.sha256(source.read_bytes()).hexdigest()


def read_ptx() -> str:
    """The kernels for every GPU since compute capability 7.5, as text that its driver compiles."""
    return (shipped_folder("token_select") / "token_select.ptx").read_text(encoding="ascii")
