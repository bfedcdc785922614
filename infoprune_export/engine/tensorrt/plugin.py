"""``infoprune::TokenSelect`` as a plugin that TensorRT, from 10.9, compiles into the engine: importing registers it.

The engine then holds the kernel's PTX and runs without this package or a plugin library. Such a plugin has one launch,
no workspace and 32-bit integers for scalars, so its scratch is a second output and floats are passed as their bits.
"""

from __future__ import annotations

import importlib
from types import GenericAlias
from typing import Any, get_type_hints

import numpy as np

from infoprune_export.doctor.probes import release
from infoprune_export.errors import InfopruneError
from infoprune_export.tokens import kernel
from infoprune_export.tokens.kernel import Settings

PLUGIN = "infoprune::TokenSelect"
_TACTIC = 1
"""The default one, 0, is not always announced before the launch is asked for."""
trt: Any = importlib.import_module("tensorrt")
trtp: Any = importlib.import_module("tensorrt.plugin")


def check_versions(tensorrt: str, numpy: str) -> None:
    """Refuse a pair that cannot read the plugin's attributes.

    Raises:
        InfopruneError: TensorRT 10 converts an array of one to an int, which NumPy 2.4 no longer does.
    """
    if release(tensorrt) < (11,) and release(numpy) >= (2, 4):
        raise InfopruneError(
            f"TensorRT {tensorrt} cannot read a plugin's attributes with NumPy {numpy}: pip install 'numpy<2.4', "
            "or set token_select to plugin in the target file"
        )


# ── What TensorRT asks ───────────────────────────────────────────────────────


def describe(
    features: Any,
    prior: Any,
    counts: Any,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float,
    temperature: float,
    exponent: float,
    epsilon: float,
) -> Any:
    """Outputs of features [B, N, D], prior fp32 [B, N], counts int32 [B]: kept int32 [B, T] and work fp32 [B, W]."""
    settings = Settings(keep_numerator, keep_denominator, pool_factor, temperature, exponent, epsilon)
    batch, tokens, width = features.shape_expr
    work = kernel.work_size(tokens, width, settings, trtp.min)
    return (
        trtp.from_shape_expr((batch, kernel.keep_size(tokens, settings)), trt.int32),
        trtp.from_shape_expr((batch, work), trt.float32),
    )


def combinations(features: Any, prior: Any, counts: Any, outputs: Any) -> Any:
    """The types of all five tensors, which follow from that of the features; every tensor is dense.

    Raises:
        InfopruneError: there is no kernel for the features' type.
    """
    name, _ = _kernel_of(features.dtype)
    return [trtp.AutoTuneCombination(f"{name}, FP32, INT32, INT32, FP32", "LINEAR", [_TACTIC])]


def launch(
    features: Any,
    prior: Any,
    counts: Any,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float,
    temperature: float,
    exponent: float,
    epsilon: float,
    outputs: Any,
    tactic: int,
) -> Any:
    """Kernel name, PTX, launch parameters and scalar arguments.

    Raises:
        InfopruneError: the largest shape of the profile, or an attribute, is beyond the kernel's limits.
    """
    settings = Settings(keep_numerator, keep_denominator, pool_factor, temperature, exponent, epsilon)
    largest = features.shape.max if features.shape.is_dynamic else tuple(features.shape)
    if reason := kernel.refusal(largest[1], largest[2], settings):
        raise InfopruneError(f"{PLUGIN}: {reason}")
    batch, tokens, width = features.shape_expr
    parameters = trtp.KernelLaunchParams(
        grid_x=batch,
        block_x=kernel.THREADS,
        shared_mem=kernel.shared_bytes(tokens, width, settings, trtp.min),
    )
    scalars = kernel.scalars(tokens, width, settings, trtp.min)
    arguments = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(value) for value in scalars))
    return _kernel_of(features.dtype)[1], kernel.read_ptx(), parameters, arguments


def _kernel_of(dtype: Any) -> tuple[str, str]:
    """TensorRT's name of the features' type, and the kernel for it."""
    names = {trt.float32: ("FP32", "float32"), trt.float16: ("FP16", "float16"), trt.bfloat16: ("BF16", "bfloat16")}
    if dtype not in names:
        raise InfopruneError(
            f"{PLUGIN}: features are {dtype}, the kernel takes fp32, fp16 or bf16; export in one of them"
        )
    name, key = names[dtype]
    return name, kernel.ENTRY_POINTS[key]


# ── Registration ─────────────────────────────────────────────────────────────


def _register() -> None:
    """TensorRT reads a plugin's inputs and attributes off these annotations, which must be its own classes."""
    check_versions(trt.__version__, np.__version__)
    tensor, text = trtp.TensorDesc, str | bytes
    inputs = dict.fromkeys(("features", "prior", "counts"), tensor)
    attributes = get_type_hints(Settings)
    pair, compiled = (tensor, tensor), (text, text, trtp.KernelLaunchParams, trtp.SymIntExprs)
    describe.__annotations__ = {**inputs, **attributes, "return": GenericAlias(tuple, pair)}
    combinations.__annotations__ = {**inputs, "outputs": GenericAlias(tuple, pair)}
    launch.__annotations__ = {
        **inputs,
        **attributes,
        "outputs": GenericAlias(tuple, pair),
        "tactic": int,
        "return": GenericAlias(tuple, compiled),
    }
    trtp.register(PLUGIN)(describe)
    trtp.autotune(PLUGIN)(combinations)
    trtp.aot_impl(PLUGIN)(launch)


_register()
