"""What the ONNX parser of each TensorRT release reads, from onnx-tensorrt's operator tables, change log and source.

Operators are looked up by name alone: the parser ignores a node's domain. A release between two tables is held to the
older one, because support only grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infoprune_export.errors import InfopruneError

# ── Every release ────────────────────────────────────────────────────────────

TOPK_LIMIT = 3840
"""K of TopK must be less."""
MAX_RANK = 8
MAX_FUNCTION_DEPTH = 24
RESERVED_PRODUCER = "TensorRT"
"""A file of this producer is read as a dump of TensorRT's own."""
RESERVED_PREFIX = "TRT_"
"""Operators of TensorRT's own dialect, in any domain."""
DATA_DEPENDENT = frozenset({"NonZero", "NonMaxSuppression"})
"""Read, but their outputs have no extents until they ran."""
ALIGNMENT = {"fp16": 8, "bf16": 8, "int8": 16}
"""Elements in 16 bytes: the granularity of a row of a matrix product. FP32 needs none."""
HEAD_DIMS = (16, 256)
"""Head sizes that fused attention has kernels for; multiples of 8."""
FLOAT_ONLY = frozenset(
    """
    Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum
    Einsum Elu Erf Exp Floor Gemm GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf
    LayerNormalization LeakyRelu Log LogSoftmax MatMul MaxPool PRelu Reciprocal Resize Round Selu Sigmoid Sin Sinh
    Softmax Softplus Softsign Sqrt Tan Tanh Upsample
    """.split()
)
"""Operators whose first input must be FP32, FP16 or BF16."""
ONE_OUTPUT = frozenset({"Attention", "BatchNormalization", "LayerNormalization", "MaxPool"})
"""Operators of which only the first output is read."""
QDQ = ("QuantizeLinear", "DequantizeLinear")


# ── By release ───────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Limits:
    """One release's parser."""

    release: tuple[int, int]
    opset: tuple[int, int]
    """Lowest and highest."""
    operators: frozenset[str]
    constant_inputs: Mapping[str, tuple[int, ...]]
    """Inputs, by number, that must be initializers or constants."""
    scatter_nd_reduction: bool
    """Whether ScatterND may say reduction="none"; other reductions are refused by all."""
    aot_plugins: bool
    """Whether Python plugins compiled ahead of time exist."""
    plugins_first: bool
    """Whether a plugin is preferred to a local function of its name; if not, the function hides it."""


# Standard operators of TensorRT 10.3, by what they do.
_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh Cast CastLike Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu
    Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul
    Neg Not Or PRelu ParametricSoftplus Pow Reciprocal Relu Round ScaledTanh Selu Shrink Sigmoid Sign Sin Sinh Softplus
    Softsign Sqrt Sub Sum Tan Tanh ThresholdedRelu Where Xor
"""
_REDUCTIONS = """
    ArgMax ArgMin CumSum Hardmax LogSoftmax ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Softmax TopK
"""
_LAYERS = """
    AveragePool BatchNormalization Conv ConvTranspose DeformConv Dropout Einsum GRU Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool GridSample GroupNormalization InstanceNormalization LRN LSTM LayerNormalization LpNormalization LpPool
    MatMul MaxPool MeanVarianceNormalization NonMaxSuppression RNN Resize RoiAlign Upsample
"""
_SHAPES = """
    Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements GatherND Identity
    ImageScaler NonZero OneHot Pad RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reshape
    ReverseSequence Scatter ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile Transpose Trilu
    Unsqueeze
"""
_CONTROL = "If Loop Scan"
_READ_BY_10_3 = frozenset([*f"{_ELEMENTWISE} {_REDUCTIONS} {_LAYERS} {_SHAPES} {_CONTROL}".split(), *QDQ])
# 10.4: windows; 10.5: STFT; 10.14: Attention; 10.15: what language models need
_READ_BY_10_16 = _READ_BY_10_3 | set(
    "BlackmanWindow HammingWindow HannWindow STFT Attention RMSNormalization RotaryEmbedding TensorScatter".split()
)
_READ_BY_11_4 = _READ_BY_10_16 | {"Swish"}

_REDUCE_AXES = {name: (1,) for name in _REDUCTIONS.split() if name.startswith("Reduce")}
_ALWAYS_CONSTANT = {
    **_REDUCE_AXES,
    **dict.fromkeys(("Squeeze", "Unsqueeze"), (1,)),
    "OneHot": (1,),
    "Dropout": (2,),
    "QuantizeLinear": (2,),
    "DequantizeLinear": (2,),
}

LIMITS = (
    Limits(
        release=(10, 3),
        opset=(9, 20),
        operators=_READ_BY_10_3,
        constant_inputs={**_ALWAYS_CONSTANT, "CumSum": (1,), "Pad": (3,)},
        scatter_nd_reduction=False,
        aot_plugins=False,
        plugins_first=False,
    ),
    Limits(
        release=(10, 16),
        opset=(9, 24),
        operators=_READ_BY_10_16,
        constant_inputs=_ALWAYS_CONSTANT,
        scatter_nd_reduction=True,
        aot_plugins=True,
        plugins_first=True,
    ),
    Limits(
        release=(11, 4),
        opset=(9, 25),
        operators=_READ_BY_11_4,
        constant_inputs=_ALWAYS_CONSTANT,
        scatter_nd_reduction=True,
        aot_plugins=True,
        plugins_first=True,
    ),
)
"""In ascending order of release."""


def limits_of(tensorrt: str) -> Limits:
    """The table that a release is held to: the newest that is not newer; ``tensorrt`` is like "10.3.0".

    Raises:
        InfopruneError: older than every table.
    """
    major, minor = (int(number) for number in tensorrt.split(".")[:2])
    fitting = [limits for limits in LIMITS if limits.release <= (major, minor)]
    if not fitting:
        oldest = ".".join(map(str, LIMITS[0].release))
        raise InfopruneError(f"TensorRT {tensorrt}: its limits are not known, those from {oldest} on are; use {oldest}")
    return fitting[-1]
